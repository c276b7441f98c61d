"""Sizes beyond the batch that differ from call to call: named, read off, and put into shapes.

One symbol is one size in all tensors of a call. Plain Python: what runs a build needs it, too.
"""

from collections.abc import Mapping

from tersor.core.errors import DataError
from tersor.core.records import Signature, TensorSpec

Sizes = Mapping[str, int]  # symbol -> size
OPEN = -1  # as a size in the shapes of a build: any that the signature leaves open


def built_sizes(signature: Signature) -> dict[str, int]:
    """Symbol -> the size of the graph's example, which builds get unless told otherwise."""
    return {
        symbol: int(size or 0)
        for spec in signature.inputs
        for symbol, size in zip(spec.dynamic, spec.shape, strict=False)
        if symbol
    }


def open_sizes(signature: Signature) -> dict[str, int]:
    """Every symbol -> OPEN: one build for all sizes."""
    return dict.fromkeys(built_sizes(signature), OPEN)


def input_shapes(
    signature: Signature, batch: int, sizes: Sizes | None = None
) -> dict[str, tuple[int, ...]]:
    """Input shapes for one batch size and one size a symbol, which may be OPEN.

    Raises:
        DataError: A size that the graph can't take.
    """
    wanted = built_sizes(signature) | dict(sizes or {})
    shapes = {}
    for spec in signature.inputs:
        shapes[spec.name] = tuple(
            batch if size is None else wanted[spec.symbol(dim)] if spec.symbol(dim) else size
            for dim, size in enumerate(spec.shape)
        )
        check_limits(spec, shapes[spec.name])
    return shapes


def sizes_of(signature: Signature, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Symbol -> size in the shapes of one call's inputs.

    Raises:
        DataError: Two sizes for one symbol; names both dimensions.
    """
    found: dict[str, tuple[int, str]] = {}
    for spec in signature.inputs:
        for dim, symbol in enumerate(spec.dynamic):
            if not symbol:
                continue
            size, where = shapes[spec.name][dim], f"dimension {dim} of input {spec.name!r}"
            known, first = found.setdefault(symbol, (size, where))
            if known != size:
                raise DataError(
                    f"{where}: found size {size}, but {first} has {known}; both are {symbol!r} and "
                    "were equal in all the inputs that the model was captured with"
                )
    return {symbol: size for symbol, (size, _) in found.items()}


def check_limits(spec: TensorSpec, shape: tuple[int, ...]) -> None:
    """Refuse a size that the graph can't take.

    Raises:
        DataError: Names the dimension, what was found and what was wanted.
    """
    for dim, (low, high, step) in enumerate(spec.limits):
        size = shape[dim]
        if not spec.symbol(dim) or size == OPEN:
            continue
        if not (low <= size <= high and (size - low) % step == 0):
            steps = f" in steps of {step}" if step > 1 else ""
            bounds = f"{low} to {high}" if high < LARGEST else f"at least {low}"
            raise DataError(
                f"dimension {dim} of input {spec.name!r} ({spec.symbol(dim)}): found size {size}, "
                f"wanted {bounds}{steps}; pad or crop to that"
            )


def limits_of(signature: Signature, symbol: str) -> tuple[int, int, int]:
    """(smallest, largest, step) of a symbol; anything from 1 where no limits are known."""
    known = (
        spec.limits[spec.dynamic.index(symbol)]
        for spec in signature.inputs
        if symbol in spec.dynamic and spec.limits
    )
    return next(known, (1, LARGEST, 1))


LARGEST = 1 << 31  # stands for no upper limit
