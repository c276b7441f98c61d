"""How the time of a kind of op follows its sizes: regressed on the node times of whole builds.

A law is a shape only. Ops of one kind and format differ by more than their sizes (layout,
neighbours, caches), so each op keeps its own level: law and levels are fitted in turn, and a time
at other sizes is the op's level times its law (FINDINGS 1).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import nnls

from tersor.core.records import Format
from tersor.graph.facts import NodeFacts

Matrix = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

TILES = (8, 16, 32, 64)
RAGGED = (8, 16)  # sides that are no multiple of these may cost more, whatever is padded
LANES = (8, 16, 32)  # elements of a vector, from f32 in AVX2 to bf16 in AVX-512
# Of one channel at a time: some kernels want fours, and take all else channel by channel; others work
# on vectors down to eight, then element by element.
DEPTH_SIDE, DEPTH_LANES = 4, 8
QUAD = 4  # integers that one instruction multiplies
_DEPTHS = 4 + 1 + len(RAGGED)  # columns of ``_depthwise`` and ``_few``
MOST_BLOCKS = 4  # that a kernel works on at once
# Columns of ``features`` that are about blocks: they would hide a tile from the choice of tiles.
_BLOCKS = slice(2 + _DEPTHS + 2 * len(RAGGED), 4 + _DEPTHS + 4 * len(RAGGED))
_ADDED, _CHANGED = -2, -1
_READ = slice(-2, None)  # of sizes: what reads a result
# Of the squared error on builds left out that it must tell, and of a node's time that is no error.
_TOLD, _EXACT = 0.02, 1e-3
_PADDED = 1  # the only column that depends on the tiles
FOLDS = 5  # of the cross-validation that chooses the tiles, by builds
# Per row, on columns of unit mean square: settles columns that say the same, moves no others.
RIDGE = 1e-4
# Profiles are cut to whole microseconds: shorter nodes count by the absolute error.
RESOLUTION_MS = 2e-3
ROUNDS = 4  # of law and levels in turn
_TILE_ROUNDS = 2  # that choose tiles again: the first levels are those of a law with wrong ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What else in a build a node's time depends on.

    Attributes:
        is_again: Another node in front has the same kind, format and sizes: its code is warm.
        is_added: A residual addition behind it is computed with it.
        is_changed: A layer in another format reads it.
    """

    is_again: bool = False
    is_added: bool = False
    is_changed: bool = False

    def numbers(self) -> tuple[float, ...]:
        """As columns of a law read them."""
        return float(self.is_again), float(self.is_added), float(self.is_changed)


ALONE = Context()


@dataclass(frozen=True, slots=True)
class Warm:
    """Whether a node mostly runs code that is warm: at its native sizes, and at others."""

    native: NodeFacts
    full: bool
    cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTime:
    """One node of one whole build, as profiled."""

    node: str
    format: Format
    build: int
    facts: NodeFacts
    ms: float
    context: Context = ALONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """Time of one kind of op in one format.

    Attributes:
        input_tile, output_tile: What channels are padded to.
        weights: One >= 0 for each column of ``features``.
    """

    input_tile: int
    output_tile: int
    weights: tuple[float, ...]

    @property
    def tiles(self) -> tuple[int, int]:
        """Of both sides."""
        return self.input_tile, self.output_tile

    def ms(self, facts: NodeFacts) -> float:
        """Time at some sizes; nothing for a node that is gone."""
        return float(self.times(_sizes([facts]))[0])

    def per_written(self) -> tuple[float, float]:
        """Milliseconds an element: with an addition computed along, and in another format's layout."""
        return self.weights[_ADDED], self.weights[_CHANGED]

    def times(self, sizes: Matrix) -> Matrix:
        """Times of many nodes, a row each as ``features`` reads them."""
        columns = features(sizes, self.input_tile, self.output_tile)
        times: Matrix = columns @ np.array(self.weights)
        return np.where(sizes[:, 3] > 0, times, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Laws:
    """A law for each kind and format, and each op's level in each format."""

    laws: dict[tuple[str, Format], Law]
    levels: dict[tuple[str, Format], float]  # (node, format) -> time over law
    warm: Mapping[str, Warm] = field(default_factory=dict)

    def ms(self, node: str, level: Format, facts: NodeFacts) -> float | None:
        """Time of a node at some sizes; None in a format in which no build showed it."""
        own = self.levels.get((node, level))
        return None if own is None else self.times(node, level, [facts])[0]

    def times(self, node: str, level: Format, facts: Sequence[NodeFacts]) -> list[float]:
        """The same at many sizes; nothing in a format in which no build showed the node."""
        own = self.levels.get((node, level))
        if own is None or not facts:
            return [0.0] * len(facts)
        contexts = [Context(is_again=self._is_warm(node, f)) for f in facts]
        found = own * self.laws[facts[0].kind, level].times(_sizes(facts, contexts))
        return [float(ms) for ms in found]

    def _is_warm(self, node: str, facts: NodeFacts) -> bool:
        own = self.warm.get(node)
        return own is not None and (own.full if facts == own.native else own.cut)


def fit_laws(times: Iterable[NodeTime]) -> Laws:
    """Fit all laws; what took no time (fused into a neighbour, or cut to zero) is left out."""
    groups: dict[tuple[str, Format], list[NodeTime]] = {}
    for row in times:
        if row.ms > 0 and row.facts.out_elements > 0:
            groups.setdefault((row.facts.kind, row.format), []).append(row)
    laws: dict[tuple[str, Format], Law] = {}
    levels: dict[tuple[str, Format], float] = {}
    for (kind, level), rows in groups.items():
        laws[kind, level], own = fit_law(rows)
        levels |= {(node, level): value for node, value in own.items()}
    return Laws(laws=laws, levels=levels)


def warm_nodes(times: Iterable[NodeTime], native: Mapping[str, NodeFacts]) -> dict[str, Warm]:
    """Which nodes run code that another one has run before, in most builds.

    Ops that the same widths move are alike in every build; others mostly at full counts.
    """
    seen: dict[tuple[str, bool], list[bool]] = {}
    for row in times:
        is_full = row.facts == native[row.node]
        seen.setdefault((row.node, is_full), []).append(row.context.is_again)
    mostly = {place: 2 * sum(again) > len(again) for place, again in seen.items()}
    return {
        node: Warm(native[node], mostly.get((node, True), False), mostly.get((node, False), False))
        for node in {node for node, _ in seen}
    }


def grouped_error(rows: Sequence[NodeTime], groups: Sequence[bool]) -> float:
    """Sum of squared logs of time over law, on builds that the laws, one a group, did not see."""
    sizes, ms = _sizes_of(rows), np.array([row.ms for row in rows])
    builds, member = np.array([row.build for row in rows]), np.array(groups)
    total = 0.0
    for seen in folds(builds):
        for group in np.unique(member):
            known, unknown = seen & (member == group), ~seen & (member == group)
            if not unknown.any():
                continue
            if not known.any():
                return math.inf
            found = _fit(sizes[known], ms[known], (TILES[0], TILES[0])).times(sizes[unknown])
            off = np.log((ms[unknown] + RESOLUTION_MS) / (found + RESOLUTION_MS))
            total += float(np.sum(np.square(off)))
    return total


def features(sizes: Matrix, input_tile: int, output_tile: int) -> Matrix:
    """What a node's time may be made of, a column each.

    A call, MACs with both sides padded to whole tiles, MACs (or, without any, activations read and
    written) where only inputs are not whole and where outputs are not, what ``_depthwise`` and ``_few`` say, and over the blocks of outputs that are worked on at once,
    MACs by passes over the inputs, windows read, activations written where outputs are not whole
    blocks, weights read, activations read and written, a call of code that is cold, scores of attention,
    ends of rows that fill no vector where elements are only moved, and activations written where an
    addition is computed along or a layer in another format reads them.

    A kernel that keeps several blocks of outputs in registers reads its inputs once for all of them. It
    takes a divisor of their number, so that 88 channels, 11 blocks of 8, cost more than 96; or four at
    a time and then the rest, so that 5 blocks are read as often as 8.

    Args:
        sizes: Rows of ``_sizes``: ``NodeFacts.sizes()``, the window, whether elements are only moved,
            and the context.
        input_tile: Channels in a tile of what is read.
        output_tile: Channels in a tile of what is written.
    """
    macs, weight, read, written, inputs, outputs, window, moves, again, added, changed = sizes.T
    channels = inputs / np.maximum(window, 1)
    # A pool of ragged channels may take ten times as long.
    work = np.where(macs > 0, macs, read + written)
    # Either side takes a kernel to another layout, so that both are not worse than one.
    sides = [
        (_is_ragged_input(channels, b) * (1.0 - _is_ragged(outputs, b)), _is_ragged(outputs, b))
        for b in RAGGED
    ]
    ragged = [work * is_ragged for pair in sides for is_ragged in pair]
    return np.stack(
        [
            np.ones(len(sizes)),
            _padded(sizes, input_tile, output_tile),
            *ragged,
            *_depthwise(sizes),
            *_few(sizes),
            *(work / _at_once(outputs, block) for block in RAGGED),
            *(work * _passes(outputs, block) for block in RAGGED),
            macs / np.maximum(outputs, 1),
            written * _is_ragged(outputs, RAGGED[0]),
            weight,
            read,
            written,
            1.0 - again,
            np.where(weight > 0, 0.0, macs / np.maximum(inputs, 1)),
            *(written * moves * _tail(inputs, lanes) for lanes in LANES),
            written * added,
            written * changed,
        ],
        axis=1,
    )


def _depthwise(sizes: Matrix) -> tuple[Matrix, ...]:
    """Of channels one by one: what counts that are no fours cost, then what those that are no eights do.

    A call a channel, results at stride 1 and at others; the last elements of each place.
    ONNX Runtime 1.24: floats of other counts leave the blocked layout, and a window with a stride is
    then gathered first; integers lie with channels innermost.
    """
    macs, _, read, written, inputs, outputs, window = sizes.T[:7]
    single = (inputs == window) & (read >= written)
    odd = single * _is_ragged(outputs, DEPTH_SIDE)
    places = single * (macs > 0) * written / np.maximum(outputs, 1)
    return (
        odd * outputs,
        odd * written * (read == written),
        odd * written * (read > written),
        places * (outputs % DEPTH_LANES),
    )


def _few(sizes: Matrix) -> tuple[Matrix, ...]:
    """Results of sums that are no whole fours, and MACs with fewer inputs than a block has.

    ONNX Runtime 1.24: integers beyond the last four are added one by one; with less than a block of inputs
    another kernel is taken, at a third of the speed.
    """
    macs, _, _, written, inputs, _, window = sizes.T[:7]
    channels = inputs / np.maximum(window, 1)
    several = (channels > 1) & (macs > 0)
    return (
        written * several * _is_ragged(inputs, QUAD),
        *(macs * several * (channels < block) for block in RAGGED),
    )


def _padded(sizes: Matrix, input_tile: int, output_tile: int) -> Matrix:
    """MACs with both sides padded to whole tiles."""
    macs, _, _, _, inputs, outputs, window = sizes.T[:7]
    channels = inputs / np.maximum(window, 1)
    padded: Matrix = macs * _share(channels, input_tile) * _share(outputs, output_tile)
    return padded


def _share(n: Matrix, tile: int) -> Matrix:
    """Padded over true size."""
    share: Matrix = np.ceil(n / tile) * tile / np.maximum(n, 1)
    return share


def _at_once(n: Matrix, block: int) -> Matrix:
    """The largest divisor, up to four, of the number of blocks."""
    blocks = np.ceil(n / block)
    found: Matrix = np.ones_like(blocks)
    for divisor in range(2, MOST_BLOCKS + 1):
        found = np.where(blocks % divisor == 0, divisor, found)
    return found


def _tail(n: Matrix, lanes: int) -> Matrix:
    """The share of a row that fills no whole vector: it may be worked on one by one."""
    share: Matrix = n % lanes / np.maximum(n, 1)
    return share


def _passes(n: Matrix, block: int) -> Matrix:
    """How often inputs are read for a block of outputs, if up to four are worked on at once."""
    blocks = np.maximum(np.ceil(n / block), 1)
    found: Matrix = np.ceil(blocks / MOST_BLOCKS) / blocks
    return found


def _is_ragged(n: Matrix, tile: int) -> Matrix:
    """1 where a size is not whole tiles."""
    ragged: Matrix = (n % tile != 0).astype(np.float64)
    return ragged


def _is_ragged_input(n: Matrix, tile: int) -> Matrix:
    """The same of what is read: less than one tile counts as whole.

    Kernels of a first convolution say nothing about others.
    """
    return _is_ragged(n, tile) * (n > tile)


def _sizes(facts: Sequence[NodeFacts], contexts: Sequence[Context] = ()) -> Matrix:
    rows = zip(facts, contexts or [ALONE] * len(facts), strict=True)
    return np.array(
        [[*f.sizes(), f.window, f.kind == "move", *c.numbers()] for f, c in rows], dtype=np.float64
    )


def _sizes_of(rows: Sequence[NodeTime]) -> Matrix:
    return _sizes([row.facts for row in rows], [row.context for row in rows])


def fit_law(
    rows: Sequence[NodeTime], tiles: tuple[int, int] | None = None
) -> tuple[Law, dict[str, float]]:
    """The law of ops of one kind in one format, and the level of each op.

    Args:
        rows: At least one; all of them took time.
        tiles: Of both sides; chosen by builds left out where not given.
    """
    sizes = _sizes_of(rows)
    ms = np.array([row.ms for row in rows])
    builds = np.array([row.build for row in rows])
    names, owner = np.unique([row.node for row in rows], return_inverse=True)
    levels = np.ones(len(names))
    best = tiles or _best_tiles(sizes, ms, builds)
    law = _fit(sizes, ms, best)
    for i in range(ROUNDS):
        own = ms / np.maximum(law.times(sizes), 1e-12)
        levels = np.array([np.median(own[owner == n]) for n in range(len(names))])
        if i < _TILE_ROUNDS and tiles is None:
            best = _best_tiles(sizes, ms / levels[owner], builds)
        if i == _TILE_ROUNDS - 1:
            sizes = _told(sizes, ms / levels[owner], builds, best)
        if i < ROUNDS - 1:
            law = _fit(sizes, ms / levels[owner], best)
    return law, {str(name): float(v) for name, v in zip(names, levels, strict=True)}


def _told(sizes: Matrix, ms: Matrix, builds: Integers, tiles: tuple[int, int]) -> Matrix:
    """Sizes without what reads a result, where that does not tell times of builds left out."""
    if not np.any(sizes[:, _READ]) or len(set(builds.tolist())) < 2:
        return sizes
    blind = sizes.copy()
    blind[:, _READ] = 0.0
    weight, masks = 1.0 / (ms + RESOLUTION_MS), list(folds(builds))
    told, untold = (
        _unseen_error(features(own, *tiles) * weight[:, None], ms * weight, masks)
        for own in (sizes, blind)
    )
    is_told = told < (1 - _TOLD) * untold - len(ms) * _EXACT**2
    return sizes if is_told else blind


def _best_tiles(sizes: Matrix, ms: Matrix, builds: Integers) -> tuple[int, int]:
    """The pair of tiles whose laws do best on builds that they did not see."""
    choices = list(product(TILES, TILES))
    if not np.any(sizes[:, 0]) or len(set(builds.tolist())) < 2:
        return choices[0]
    weight = 1.0 / (ms + RESOLUTION_MS)
    columns = features(sizes, *choices[0]) * weight[:, None]
    columns[:, _BLOCKS] = 0.0
    masks = list(folds(builds))
    errors = []
    for tiles in choices:  # they change one column
        columns[:, _PADDED] = _padded(sizes, *tiles) * weight
        errors.append(_unseen_error(columns, ms * weight, masks))
    return choices[int(np.argmin(errors))]


def _unseen_error(columns: Matrix, relative: Matrix, masks: Sequence[Mask]) -> float:
    """Sum of squared relative errors on builds that the weights did not see."""
    total = 0.0
    for seen in masks:
        off = columns[~seen] @ _weights(columns[seen], relative[seen]) - relative[~seen]
        total += float(np.sum(np.square(off)))
    return total


def folds(builds: Integers) -> Iterator[Mask]:
    """Masks of what is seen; each build is unseen once."""
    places = np.unique(builds, return_inverse=True)[1]
    n = min(FOLDS, int(places.max()) + 1)
    for fold in range(n):
        yield places % n != fold


def _fit(sizes: Matrix, ms: Matrix, tiles: tuple[int, int]) -> Law:
    weight = 1.0 / (ms + RESOLUTION_MS)
    found = _weights(features(sizes, *tiles) * weight[:, None], ms * weight)
    return Law(input_tile=tiles[0], output_tile=tiles[1], weights=tuple(float(w) for w in found))


def _weights(columns: Matrix, relative: Matrix) -> Matrix:
    """Ridge non-negative least squares; rows are over the times that they are to give."""
    norms = np.sqrt(np.mean(np.square(columns), axis=0))
    scale = np.where(norms > 0, norms, 1.0)
    n = columns.shape[1]
    rows = np.vstack([columns / scale, np.sqrt(RIDGE * len(relative)) * np.eye(n)])
    found, _ = nnls(rows, np.concatenate([relative, np.zeros(n)]))
    return np.where(norms > 0, found / scale, 0.0)
