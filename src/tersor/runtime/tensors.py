"""A caller's tensors to arrays and back: NumPy or PyTorch, which is used but never imported."""

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.core.errors import DataError
from tersor.core.records import TensorSpec
from tersor.graph.shapes import check_limits

Array = NDArray[Any]
# What a TensorSpec's carrier may be is known to NumPy; bfloat16 itself is not.
_NUMPY_LACKS = ("bfloat16",)
_KINDS = {"f": "float", "i": "integer", "u": "integer", "b": "bool"}


@dataclass(frozen=True, slots=True)
class Origin:
    """What the caller passed, which is what he gets back: a torch device, or None for NumPy."""

    device: Any = None


def origin_of(leaves: list[Any]) -> Origin:
    """The device of the first torch tensor, or NumPy where there is none."""
    torch = sys.modules.get("torch")
    if torch is not None:
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                return Origin(leaf.device)
    return Origin()


def to_array(leaf: Any, spec: TensorSpec, place: str = "") -> Array:
    """One input as an array of the type that builds take, of the declared shape.

    The batch is free; a dimension with a symbol is, within its limits. ``place``: what the caller calls it.

    Raises:
        DataError: Another rank or size, a change between float and integer, or integers that do
            not fit; names the input.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(leaf, torch.Tensor):
        leaf = leaf.detach().to("cpu")
        leaf = (leaf.float() if leaf.dtype == torch.bfloat16 else leaf).numpy()
    array = np.asarray(leaf)
    name = place or spec.name
    _check_shape(array, spec, name)
    return _cast(array, spec, name)


def from_array(array: Array, spec: TensorSpec, origin: Origin) -> Any:
    """One output as the caller wants it; NumPy callers get bfloat16 as float32."""
    if origin.device is None:
        wanted = spec.carrier if spec.dtype in _NUMPY_LACKS else spec.dtype
        with np.errstate(over="ignore"):  # becomes infinite, as in the original
            return array.astype(wanted, copy=False)
    array = array.astype(spec.carrier, copy=False)
    torch = sys.modules["torch"]
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array)
    tensor = torch.from_numpy(array)
    return tensor.to(device=origin.device, dtype=getattr(torch, spec.dtype))


def batch_dim(spec: TensorSpec) -> int | None:
    """Which dimension is the batch, or None."""
    return spec.shape.index(None) if None in spec.shape else None


def _check_shape(array: Array, spec: TensorSpec, name: str) -> None:
    sizes_fit = len(array.shape) == len(spec.shape) and all(
        wanted in (None, found) or spec.symbol(dim)
        for dim, (found, wanted) in enumerate(zip(array.shape, spec.shape, strict=True))
    )
    if not sizes_fit:
        wanted = ", ".join(
            "batch" if size is None else spec.symbol(dim) or str(size)
            for dim, size in enumerate(spec.shape)
        )
        raise DataError(
            f"input {name!r}: found shape {tuple(array.shape)}, wanted ({wanted}); "
            "resize or pad it as when the model was captured"
        )
    check_limits(replace(spec, name=name), array.shape)


def _cast(array: Array, spec: TensorSpec, name: str) -> Array:
    wanted = np.dtype(spec.carrier)
    if array.dtype == wanted:
        return array
    found_kind, wanted_kind = _KINDS.get(array.dtype.kind), _KINDS[wanted.kind]
    if found_kind != wanted_kind and not (found_kind == "bool" and wanted_kind == "integer"):
        raise DataError(
            f"input {name!r}: found {array.dtype.name}, wanted {spec.dtype}; convert it "
            "yourself if that is what you mean"
        )
    if wanted_kind == "integer" and found_kind == "integer" and array.size:
        limits = np.iinfo(wanted)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise DataError(
                f"input {name!r}: found values from {low} to {high}, which do not fit {spec.dtype}"
            )
    with np.errstate(over="ignore"):  # becomes infinite, which the guards see
        return array.astype(wanted)
