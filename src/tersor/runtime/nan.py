"""NaN goes in, NaN comes out: what the original does, and a build may not.

8-bit codes have no NaN, and some float kernels lose it in a maximum: a number comes out that stands for
nothing. Samples with NaN in an input give NaN in the outputs that depend on it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.core.records import Signature, TensorSpec
from tersor.runtime.tensors import batch_dim

Array = NDArray[Any]


def spread_nan(
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Array],
    signature: Signature,
    spreads: Mapping[str, Sequence[str]],
) -> dict[str, Array]:
    """The outputs, with NaN for the samples whose inputs have any.

    Args:
        inputs: By name; a sum tells whether there is any NaN, so that others cost one reading.
        outputs: By name; never written to.
        signature: Where samples stand.
        spreads: Input -> the outputs that depend on it.
    """
    found = dict(outputs)
    for spec in signature.inputs:
        reached = spreads.get(spec.name, ())
        rows = _rows_with_nan(inputs[spec.name], spec) if reached else None
        if rows is None:
            continue
        for out in signature.outputs:
            if out.name in reached and found[out.name].dtype.kind == "f":
                found[out.name] = _without(found[out.name], rows, batch_dim(out))
    return found


def _rows_with_nan(array: Array, spec: TensorSpec) -> Array | None:
    """Flags of the samples with NaN; one flag where there is no batch; None where there is none."""
    with np.errstate(all="ignore"):
        if array.dtype.kind != "f" or not np.isnan(array.sum()):
            return None
    dim = batch_dim(spec)
    others = tuple(i for i in range(array.ndim) if i != dim)
    rows = np.asarray(np.isnan(array).any(axis=others))
    return rows if rows.any() else None  # infinities of both signs have such a sum, too


def _without(output: Array, rows: Array, dim: int | None) -> Array:
    if dim is None or rows.ndim == 0:
        return np.full_like(output, np.nan)
    changed = output.copy()
    np.moveaxis(changed, dim, 0)[rows] = np.nan
    return changed
