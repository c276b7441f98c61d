"""Where a graph can be taken apart: positions behind which few values are still needed.

Behind a residual block, a layer of a transformer or any node of a chain there is one such value.
Nothing here goes by the names of modules.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from tersor.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Block:
    """A run of nodes between two frontiers.

    Attributes:
        nodes: All nodes that depend on a trained tensor, in graph order, and the tensors they read.
        reads: Values from the frontier before, names.
        gives: Values that anything behind it needs, names; of the last block the outputs.
        context: Values that it reads and that depend on no trained tensor.
        ops: Names of its linear maps and convolutions.
        is_last: The graph's outputs follow from ``gives``.
    """

    nodes: tuple[fx.Node, ...]
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    context: tuple[str, ...]
    ops: tuple[str, ...]
    is_last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSize:
    """How many linear maps and convolutions a block has.

    Args:
        least: Smaller blocks join the next one, as maps that are trained together make up for more
            than each can by itself. On ResNet-20 at a quarter of its multiply-accumulates the
            divergence from the original, .068 before, was .058 with a least of 2 after 2,000 steps,
            .054 with 4 after 1,250 and with 7 after 1,400; at a half, .028 before, .024, .022, .024.
        most: Beyond it a run without a single value between is cut where few values pass.

    Raises:
        ConfigError: Not 1 <= least <= most.
    """

    least: int = 4
    most: int = 12

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(
                f"block size: found {self.least} to {self.most}, wanted at least 1, and no more of "
                "the first than of the second"
            )


@dataclass(frozen=True, slots=True)
class _Place:
    """A position in the order, and what passes it."""

    index: int
    live: tuple[str, ...]
    ops: int  # before and at it


class _Walk:
    """The nodes that depend on trained tensors, in order, and the frontier behind each."""

    def __init__(
        self, module: fx.GraphModule, trained: Collection[str], weighted: Collection[str]
    ) -> None:
        self.nodes: list[fx.Node] = list(module.graph.nodes)
        self.weighted = weighted
        self.moving: set[fx.Node] = set()
        for node in self.nodes:
            is_trained = node.op == "get_attr" and str(node.target) in trained
            if is_trained or any(s in self.moving for s in node.all_input_nodes):
                self.moving.add(node)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.steps = [n for n in self.nodes if n in self.moving and n.op == "call_function"]

    def places(self, known: Collection[str]) -> Iterator[_Place]:
        """Every position where all that passes is a tensor which the original has, too."""
        last = {n: max((self.place[u] for u in n.users), default=-1) for n in self.steps}
        live: list[fx.Node] = []
        ops = 0
        for node in self.steps:
            ops += node.name in self.weighted
            here = self.place[node]
            live = [n for n in (*live, node) if last[n] > here]
            names = tuple(n.name for n in live)
            is_alike = all(n.name in known and _is_tensor(n) for n in live)
            if names and is_alike:
                yield _Place(here, names, ops)

    def block(self, start: int, stop: int, reads: Sequence[str], gives: Sequence[str]) -> Block:
        inside = [n for n in self.steps if start < self.place[n] <= stop]
        own = {n.name for n in inside}
        sources = {s for n in inside for s in n.all_input_nodes}
        stored = {s for s in sources if s.op == "get_attr"}
        outside = {s.name for s in sources if s.name not in own and s.op != "get_attr"}
        nodes = sorted((*stored, *inside), key=self.place.__getitem__)
        before = set(reads)
        return Block(
            nodes=tuple(nodes),
            reads=tuple(n for n in reads if n in outside or n in gives),
            gives=tuple(gives),
            context=tuple(sorted(outside - before)),
            ops=tuple(n.name for n in inside if n.name in self.weighted),
            is_last=stop >= len(self.nodes) - 1,
        )


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def find_blocks(
    module: fx.GraphModule,
    trained: Collection[str],
    weighted: Collection[str],
    known: Collection[str],
    size: BlockSize = BlockSize(),
) -> tuple[Block, ...]:
    """Blocks front to back that cover every node which depends on a trained tensor.

    Args:
        module: The graph, its nodes with shapes; without ops that write in place.
        trained: Targets of the tensors that are trained.
        weighted: Names of its linear maps and convolutions.
        known: Names of nodes that have a counterpart to compare with; blocks end at those only.
        size: Of blocks.

    Returns:
        Nothing where no node depends on a trained tensor.
    """
    walk = _Walk(module, trained, weighted)
    if not walk.steps:
        return ()
    ends = _ends(list(walk.places(known)), sum(n.name in weighted for n in walk.steps), size)
    output = next(n for n in walk.nodes if n.op == "output")
    last = tuple(s.name for s in output.all_input_nodes if s in walk.moving)
    blocks: list[Block] = []
    start = -1
    reads: tuple[str, ...] = ()
    for place in ends:
        blocks.append(walk.block(start, place.index, reads, place.live))
        start, reads = place.index, place.live
    blocks.append(walk.block(start, len(walk.nodes) - 1, reads, last))
    return tuple(blocks)


def whole(
    module: fx.GraphModule, trained: Collection[str], weighted: Collection[str]
) -> Block | None:
    """All blocks as one; None where no node depends on a trained tensor."""
    found = find_blocks(module, trained, weighted, ())
    return found[0] if found else None


def penultimate(
    module: fx.GraphModule,
    trained: Collection[str],
    weighted: Collection[str],
    known: Collection[str],
) -> str | None:
    """The largest value that everything behind it follows from, near the end; the latest of those.

    In front of the classifier and of the pooling before it; where no linear map stands behind the
    last block, in front of the pooling alone. None where there is no such place.

    Args:
        module: The graph, its nodes with shapes.
        trained: Targets of the tensors that are trained.
        weighted: Names of its linear maps and convolutions.
        known: Names of nodes that have a counterpart to compare with.
    """
    walk = _Walk(module, trained, weighted)
    total = sum(n.name in weighted for n in walk.steps)
    output = next(n for n in walk.nodes if n.op == "output")
    results = {n.name for n in output.all_input_nodes}
    single = [p for p in walk.places(known) if len(p.live) == 1 and p.live[0] not in results]
    for ops in (total, total - 1):
        sizes = [
            (_elements(walk.nodes[p.index]), p.index) for p in single if p.ops == ops and ops > 0
        ]
        if sizes:
            return walk.nodes[max(sizes)[1]].name
    return None


def _elements(node: fx.Node) -> int:
    """Of one sample's value, sizes that vary counted as traced."""
    value = node.meta["val"]
    return math.prod(int(size) for size in value.shape[1:])


def _ends(places: Sequence[_Place], total: int, size: BlockSize) -> list[_Place]:
    """Where blocks end, but for the last one."""
    single = _latest([p for p in places if len(p.live) == 1], total)
    found: list[_Place] = []
    done = 0
    for place in (*single, None):
        upto = total if place is None else place.ops
        inside = [p for p in _latest(places, total) if done < p.ops < upto]
        found += _split(inside, done, upto, size)
        done = found[-1].ops if found else 0
        if place is not None and place.ops - done >= size.least and total - place.ops > 0:
            found.append(place)
            done = place.ops
    return found


def _latest(places: Sequence[_Place], total: int) -> list[_Place]:
    """Of positions with the same ops before them those where fewest values pass, the latest."""
    best: dict[int, _Place] = {}
    for place in places:
        known = best.get(place.ops)
        if 0 < place.ops < total and (known is None or len(place.live) <= len(known.live)):
            best[place.ops] = place
    return [best[ops] for ops in sorted(best)]


def _split(inside: Sequence[_Place], done: int, upto: int, size: BlockSize) -> list[_Place]:
    """Ends inside of a run that is too long: where fewest values pass, each time."""
    found: list[_Place] = []
    while upto - done > size.most:
        options = [
            p
            for p in inside
            if size.least <= p.ops - done <= size.most and upto - p.ops >= size.least
        ]
        if not options:
            break
        best = min(options, key=lambda p: (len(p.live), -p.ops))
        found.append(best)
        done = best.ops
    return found
