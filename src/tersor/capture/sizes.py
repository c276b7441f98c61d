"""Names and limits of the sizes that an exported program leaves open."""

from collections.abc import Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor

from tersor.capture.exporting import Place, is_dynamic
from tersor.core.records import TensorSpec
from tersor.graph.shapes import LARGEST

_WINDOW = 64  # sizes above the example's at which the guards are asked; no step is larger
_KINDS = {4: {2: "height", 3: "width"}}  # by rank and dimension; everything else is a length


class Names:
    """One name for each open size of the inputs, shared by sizes that are always equal.

    Args:
        values: Fake tensors of the flat inputs.
        seen: Sizes of each open dimension in the data, one a group of samples.
    """

    def __init__(self, values: Sequence[Tensor], seen: dict[Place, tuple[int, ...]]) -> None:
        self.batch = {
            s for v in values if v.dim() and is_dynamic(v.shape[0]) for s in _symbols(v.shape[0])
        }
        self.names: dict[sympy.Symbol, sympy.Symbol] = {}
        self._taken: dict[tuple[tuple[int, ...], str], list[tuple[int, sympy.Symbol]]] = {}
        self._counts: dict[str, int] = {}
        for column, value in enumerate(values):
            for dim in range(1, value.dim()):
                if is_dynamic(value.shape[dim]):
                    self._name(column, dim, value, seen.get((column, dim), ()))

    def _name(self, column: int, dim: int, value: Tensor, sizes: tuple[int, ...]) -> None:
        """A symbol of torch gets the name of another input's size that was always equal."""
        kind = _KINDS.get(value.dim(), {}).get(dim, "length")
        for symbol in sorted(_symbols(value.shape[dim]) - set(self.names) - self.batch, key=str):
            rivals = self._taken.setdefault((sizes, kind), [])
            equal = [name for other, name in rivals if other != column and sizes]
            if equal:
                self.names[symbol] = equal[0]
                continue
            self._counts[kind] = self._counts.get(kind, 0) + 1
            self.names[symbol] = sympy.Symbol(f"{kind}_{self._counts[kind]}", integer=True)
            rivals.append((column, self.names[symbol]))

    def of(self, size: Any) -> str | None:
        """The name of a size, or the expression of names that it is; None is the batch."""
        if not is_dynamic(size):
            return ""
        symbols = _symbols(size)
        if symbols & self.batch or symbols - set(self.names):
            return None
        return str(size.node.expr.xreplace(self.names))


def described(name: str, dtype: str, known: Sequence[int], value: Any, names: Names) -> TensorSpec:
    """The specification of a tensor with that shape in the example and that fake value."""
    if value is None:
        return TensorSpec(name=name, dtype=dtype, shape=(None, *known[1:]))
    found = [names.of(size) for size in value.shape]
    return TensorSpec(
        name=name,
        dtype=dtype,
        shape=tuple(
            None if symbol is None else size for symbol, size in zip(found, known, strict=True)
        ),
        dynamic=tuple(symbol or "" for symbol in found) if any(found) else (),
    )


def limits(
    program: torch.export.ExportedProgram, value: Tensor, spec: TensorSpec
) -> tuple[tuple[int, int, int], ...]:
    """(smallest, largest, step) of every open size of an input, by torch's own guards.

    The guards are what the code asked of a size while it was exported; the graph computes what
    the code does only where they hold.
    """
    if not any(spec.dynamic):
        return ()
    return tuple(
        _limit(program, value.shape[dim]) if spec.symbol(dim) else (0, 0, 0)
        for dim in range(value.dim())
    )


def _limit(program: torch.export.ExportedProgram, size: Any) -> tuple[int, int, int]:
    expression, hint = size.node.expr, int(size.node.hint)
    if not expression.is_Symbol:
        return 1, LARGEST, 1
    bounds = program.range_constraints.get(expression)
    low = 1 if bounds is None else max(1, int(bounds.lower))
    high = LARGEST if bounds is None else int(min(bounds.upper, LARGEST))
    holds = _guards(size, expression, hint, high)
    step = next(
        s for s in range(1, _WINDOW + 1)
        if all(g(v) for g in holds for v in range(hint, min(high, hint + _WINDOW) + 1, s))
        or s == _WINDOW
    )  # fmt: skip
    smallest = hint
    while smallest - step >= low and all(g(smallest - step) for g in holds):
        smallest -= step
    return smallest, smallest + (high - smallest) // step * step if high < LARGEST else high, step


def _guards(size: Any, symbol: sympy.Symbol, hint: int, high: int) -> list[Any]:
    """The guards on one symbol alone, as functions of its value.

    A guard that fails at a single size, ``s != 7``, tells two sizes of the example apart and is
    left out: broadcasting asks it, and computes the same on both sides.
    """
    found = []
    for guard in {g.expr for g in size.node.shape_env.guards}:
        if guard.free_symbols != {symbol}:
            continue

        def holds(value: int, guard: Any = guard) -> bool:
            return bool(guard.xreplace({symbol: sympy.Integer(value)}) != sympy.false)

        above = [holds(v) for v in range(hint, min(high, hint + _WINDOW) + 1)]
        if above.count(False) != 1 or len(above) == 1 or not isinstance(guard, sympy.Ne):
            found.append(holds)
    return found


def _symbols(size: Any) -> set[sympy.Symbol]:
    return set(size.node.expr.free_symbols)
