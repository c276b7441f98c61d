"""The law that every cut graph must pass: cutting units out computes what zeroing them does.

The comparison can fail: zeroing must change the output by far more than the tolerance, else the
check would have shown nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tersor.core.errors import ParityError
from tersor.graph.axes.heads import Heads, Turn, turned
from tersor.graph.axes.slicing import cut, mask
from tersor.graph.axes.widths import Axes
from tersor.graph.contracts import Graph
from tersor.graph.edit import copy_graph, rebuild

# Sums of fewer terms in another order: a few hundred roundings of 2**-24, of the output's scale.
TOLERANCE = 1e-5
EFFECT = 100  # how many tolerances zeroing must move the output
# Maps that are folded into weights round these: once more per weight than a cut does.
_TURN_TOLERANCE = 1e-4
_SHARE = 0.5  # of the units of a width whose own cut shows nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """One comparison of a cut graph with the masked one.

    Attributes:
        difference: Largest, of the output's scale.
        effect: How far masking moves the output, of its scale.
        batch: Samples in the comparison; another number than the graph was captured with.
        silent: Widths that move nothing by themselves: their rule was not tested.
    """

    difference: float
    effect: float
    batch: int
    tolerance: float
    silent: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Equal, and the comparison could have failed."""
        return self.difference <= self.tolerance and self.effect >= EFFECT * self.tolerance


def check(
    graph: Graph,
    axes: Axes,
    gone: Mapping[str, Sequence[int]],
    *,
    inputs: Sequence[Tensor] | None = None,
    each: bool = False,
    exact_norms: bool = False,
) -> GateReport:
    """Compare cutting with zeroing, at another batch size than the example's.

    Args:
        graph: The graph that was analysed.
        axes: Its widths.
        gone: Width -> indices of removed units. Approximate widths differ by nature: leave them out,
            or set ``exact_norms``.
        inputs: Flat inputs; None: the example's samples, repeated.
        each: Also zero each width alone, to name those that move nothing.
        exact_norms: Cut with norms that keep the statistics of the whole width.
    """
    flat = list(inputs) if inputs is not None else other_batch(graph)
    removed = axes.removed(gone)
    wanted = _run(mask(graph, axes, removed), flat)
    found = _run(cut(graph, axes, removed, exact_norms=exact_norms), flat)
    plain = _run(graph, flat)
    silent = []
    if each:
        for name, units in gone.items():
            alone = _run(mask(graph, axes, axes.removed({name: units})), flat)
            if _difference(alone, plain) < EFFECT * TOLERANCE:
                silent.append(name)
    return GateReport(
        difference=_difference(found, wanted),
        effect=_difference(wanted, plain),
        batch=len(flat[0]),
        tolerance=TOLERANCE,
        silent=tuple(silent),
    )


def require(
    graph: Graph, axes: Axes, gone: Mapping[str, Sequence[int]], *, exact_norms: bool = False
) -> GateReport:
    """The check of a cut that is about to be used.

    A plan removes units that matter little, and what moves nothing shows nothing: the widths whose
    own units leave the output as it was are checked again with a random share of their units gone.

    Returns:
        The cut's own report. ``silent`` names widths of which no share moves the output either:
        nothing depends on them.

    Raises:
        ParityError: Cutting and zeroing differ.
    """
    report = _equal(check(graph, axes, gone, each=True, exact_norms=exact_norms), gone)
    if not report.silent:
        return report
    shares = random_share(axes, _SHARE, seed=0, exact_only=False)
    silent = {name: shares[name] for name in report.silent}
    again = _equal(check(graph, axes, silent, each=True, exact_norms=exact_norms), silent)
    return replace(report, silent=again.silent)


def turns_freely(graph: Graph, heads: Heads, *, seed: int = 0) -> bool:
    """Whether random maps of the heads, in both projections, leave the outputs as they are.

    The comparison must be able to fail: the maps of one projection alone have to move the outputs.

    Args:
        graph: The graph that was analysed.
        heads: How one width lies in it.
        seed: Of the maps.
    """
    flat = other_batch(graph)
    plain = _run(graph, flat)
    turn = _random_turn(graph, heads, seed)
    half = {name: maps for name, maps in turn.items() if name in heads.tensors_of(graph, "first")}
    moved = _difference(_run(turned(graph, heads.places, half), flat), plain)
    same = _difference(_run(turned(graph, heads.places, turn), flat), plain)
    return same <= _TURN_TOLERANCE and moved >= EFFECT * TOLERANCE and same * EFFECT <= moved


def _random_turn(graph: Graph, heads: Heads, seed: int) -> Turn:
    """Orthogonal maps: one a head of the projection that has fewer."""
    generator = torch.Generator().manual_seed(seed)
    firsts, seconds = (heads.tensors_of(graph, side) for side in ("first", "second"))
    counts = {name: len(rows) for name, (_, rows) in heads.places.items()}
    least = min(counts.values())
    d = next(iter(heads.places.values()))[1].shape[1]
    square = torch.randn(least, d, d, generator=generator, dtype=torch.float64)
    maps = torch.linalg.qr(square).Q
    return {name: maps.repeat_interleave(counts[name] // least, 0) for name in (*firsts, *seconds)}


def _equal(report: GateReport, gone: Mapping[str, Sequence[int]]) -> GateReport:
    if not report.difference <= report.tolerance:
        raise ParityError(
            f"cutting {sum(len(u) for u in gone.values())} units of {', '.join(list(gone)[:4])} "
            f"differs from zeroing them by {report.difference:.2e} of the output's scale at batch "
            f"{report.batch}, wanted at most {report.tolerance:g}: a rule is wrong for this model; "
            "leave the widths out with methods=('quantize',), and please report it"
        )
    return report


def other_batch(graph: Graph) -> list[Tensor]:
    """The example's samples in another number and order."""
    count = len(graph.example[0])
    index = torch.arange(count + 1).flip(0) % count
    return [t[index] if t.dim() and len(t) == count else t for t in graph.example]


def random_share(
    axes: Axes, share: float, seed: int, *, exact_only: bool = True
) -> dict[str, list[int]]:
    """A random share of every width, at least one unit gone and one left."""
    rng = np.random.default_rng(seed)
    found = {}
    for width in axes.widths:
        if exact_only and width.exactness != "exact":
            continue
        n = min(width.units - width.least, max(1, round(share * width.units)))
        found[width.name] = sorted(rng.choice(width.units, n, replace=False).tolist())
    return found


def check_random(
    graph: Graph,
    axes: Axes,
    *,
    share: float = 0.3,
    seed: int = 0,
    each: bool = False,
    exact_norms: bool = False,
) -> GateReport:
    """A random share of every exact width at once, with norm statistics that are not trivial.

    With ``exact_norms`` approximate widths take part.
    """
    shaken = randomised(graph, seed)
    gone = random_share(axes, share, seed, exact_only=not exact_norms)
    return check(shaken, axes, gone, each=each, exact_norms=exact_norms)


def randomised(graph: Graph, seed: int) -> Graph:
    """The graph with stored vectors that fresh models leave at 0 or 1 drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    fresh, tensors = copy_graph(graph.module)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() > 1 and _is_constant(tensor):
            noise = torch.rand(tensor.shape, generator=generator)
            tensors[name] = (tensor + 0.2 * (noise - 0.5) + 0.05).to(tensor.dtype)
    return Graph(rebuild(fresh, tensors), graph.signature, graph.example)


def _is_constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.flatten()[0]).all()) and bool(torch.isfinite(tensor).all())


def _run(graph: Graph, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return graph.run([t.clone() for t in flat])


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest difference of any output, each of its own scale."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() and a.is_floating_point():
            scale = float(b.abs().max()) or 1.0
            gap = float((a.double() - b.double()).abs().max()) / scale
            worst = max(worst, gap if np.isfinite(gap) else float("inf"))
    return worst
