"""Where two graphs, or a graph and its build, begin to compute something else.

Two graphs are compared at every value that both have. Beside the error that has come together up to a
value stands its own: what its op makes of the *first* graph's values, saved on a run of that graph. A
large error that is no op's own came from before.

A build shows only its outputs, so that the graph is built again to end early, and the first value
that differs is found by a few steps and bisection: some fifteen builds for hundreds of values.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tersor.graph.contracts import Graph
from tersor.graph.edit import Environment, execute, last_uses, run_all
from tersor.graph.mutation import has_mutation

STEPS = 8  # parts of a graph whose ends are looked at before one of them is cut in halves
_TINY = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A value that both graphs have.

    Attributes:
        node: Its name in both.
        op: What computes it in the second graph.
        error: Mean squared difference over the first graph's mean square.
        own: The same where everything before is the first graph's.
    """

    node: str
    op: str
    error: float
    own: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildDivergence:
    """A build beside its graph.

    Attributes:
        build: How it was built.
        error: Of its outputs, as of ``Point``.
        limit: Above which it differs: what was asked for, or what rounding allows, whichever is less.
        first: The first value above the limit that was found; None where none is.
        looked: The values that were built as outputs, in the order of the search, and their errors.
    """

    build: str
    error: float
    limit: float
    first: str | None
    looked: tuple[tuple[str, float], ...] = ()


def compare_graphs(one: Graph, other: Graph, flat: Sequence[Tensor]) -> tuple[Point, ...]:
    """Errors of the second graph's values against the first one's, in the second one's order.

    Args:
        one: Whose values are right.
        other: With the same inputs.
        flat: Flat inputs of a few samples.

    Returns:
        Empty where no value of the same name has the same shape in both, or where one of them writes in
        place, so that its values are no longer there to be compared.
    """
    if has_mutation(one.module.graph) or has_mutation(other.module.graph):
        return ()
    values = run_all(one.module, flat)
    plain = {n.name for n in one.module.graph.nodes if n.op == "call_function"}
    whole = _errors(other, flat, values, plain, replaced=False)
    own = _errors(other, flat, values, plain, replaced=True)
    targets = {n.name: str(n.target) for n in other.module.graph.nodes}
    return tuple(
        Point(node=name, op=targets[name], error=error, own=own[name])
        for name, error in whole.items()
    )


def _errors(
    graph: Graph, flat: Sequence[Tensor], values: Environment, names: set[str], *, replaced: bool
) -> dict[str, float]:
    """Errors by node; ``replaced``: what was compared goes on as the saved value."""
    env: Environment = {}
    done = last_uses(graph.module)
    stream = (t.clone() for t in flat)
    found: dict[str, float] = {}
    with torch.no_grad():
        for node in graph.module.graph.nodes:
            if node.op == "placeholder":
                env[node.name] = next(stream)
                continue
            value = execute(graph.module, node, env)
            known = values.get(node.name) if node.name in names else None
            if node.op == "call_function" and _is_comparable(value, known):
                found[node.name] = squared_error(value, known)
                value = known.clone() if replaced else value  # type: ignore[union-attr]
            env[node.name] = value
            for name in done.get(node.name, ()):
                env.pop(name, None)
    return found


def _is_comparable(value: Any, known: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and isinstance(known, Tensor)
        and value.is_floating_point()
        and known.is_floating_point()
        and value.shape == known.shape
        and value.numel() > 0
    )


def squared_error(found: Tensor, wanted: Any) -> float:
    """Mean squared difference over the wanted mean square; infinite where something is no number."""
    spread = float(wanted.double().square().mean()) + _TINY
    error = float((found.double() - wanted.double()).square().mean()) / spread
    return error if math.isfinite(error) else math.inf


def first_above(
    names: Sequence[str], error_at: Callable[[str], float | None], limit: float
) -> tuple[str | None, tuple[tuple[str, float], ...]]:
    """The first name whose error is above the limit, and all that was asked.

    A few names are asked in order, and then the gap in front of the first one above by bisection: an
    error that later ops hide again is found if it lasts for an eighth of the names.

    Args:
        names: In order.
        error_at: The error at a name; None where it can't be told, so that its neighbour is asked.
        limit: The largest error that counts as none.
    """
    asked: list[tuple[str, float]] = []

    def is_above(name: str) -> bool | None:
        error = error_at(name)
        if error is None:
            return None
        asked.append((name, error))
        return not error <= limit

    last = len(names) - 1
    marks = sorted({-(-last * i // STEPS) for i in range(1, STEPS + 1)}) if names else []
    low = 0  # all names in front of it are within
    for mark in marks:
        above = is_above(names[mark])
        if above:
            return _first_between(list(names[low:mark]), names[mark], is_above), tuple(asked)
        low = low if above is None else mark + 1
    return None, tuple(asked)


def _first_between(names: list[str], after: str, is_above: Callable[[str], bool | None]) -> str:
    """The first of some names that is above, by halves, or else the name after them."""
    while names:
        middle = len(names) // 2
        above = is_above(names[middle])
        if above is None:
            del names[middle]
        elif above:
            after, names = names[middle], names[:middle]
        else:
            names = names[middle + 1 :]
    return after
