"""What the outputs mean: the geometry in which changes are measured."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.core.errors import CaptureError, DataError
from tersor.core.records import OutputKind, TensorSpec

_UNIT = 1e-3


def output_kind(stated: OutputKind | None, outputs: tuple[Tensor, ...]) -> OutputKind:
    """The stated geometry, or one inferred from a few outputs, with a warning.

    Raises:
        DataError: Nothing among the outputs is a float tensor.
    """
    floats = [t for t in outputs if t.is_floating_point() and t.dim() > 0]
    if not floats:
        raise DataError(
            "the model returns no float tensor of one row a sample (but "
            f"{', '.join(str(t.dtype).removeprefix('torch.') for t in outputs)}), so a change of its "
            "output has no size; return the scores that its answers are made of as well"
        )
    if stated is not None:
        return stated
    kind = _infer(floats[0])
    warnings.warn(
        f"the geometry of the outputs was inferred as {kind!r} from a shape of "
        f"{tuple(floats[0].shape)}; say tersor.Data(..., output='logits' | 'embedding' | 'values')",
        stacklevel=4,
    )
    return kind


def require_samples(
    specs: Sequence[TensorSpec], first: Sequence[Tensor], second: Sequence[Tensor]
) -> None:
    """Refuse outputs that are not one row a sample, but for single numbers that never change.

    Args:
        specs: Of the outputs.
        first: The outputs of one sample.
        second: Those of another one.

    Raises:
        CaptureError: Names the output, and the way out.
    """
    for spec, one, other in zip(specs, first, second, strict=True):
        batches = spec.shape.count(None)
        is_fixed = one.shape == other.shape and torch.equal(one, other)
        if (batches == 1 and _is_row(spec, one)) or (not one.dim() and is_fixed):
            continue
        what = "is a constant" if is_fixed else "is one value for a whole batch"
        if batches > 1:
            what = "has the batch in several dimensions, so that its samples belong together"
        elif batches:
            what = "is what one sample gives"
        raise CaptureError(
            f"output {spec.name!r}, shape {tuple(one.shape)}, {what}; wanted outputs of one row a "
            "sample (dimension 0): return only those from forward() (transposed, or not flattened), or "
            "pass a module around the model that does; losses, anchors and the like go outside"
        )


def _is_row(spec: TensorSpec, output: Tensor) -> bool:
    return spec.shape[0] is None and output.shape[0] == 1


def _infer(output: Tensor) -> OutputKind:
    if output.dim() >= 2:
        norms = output.double().reshape(len(output), -1).norm(dim=1)
        if output.dim() == 2 and bool(((norms - 1).abs() < _UNIT).all()):
            return "embedding"
    if output.dim() == 2 and output.shape[1] >= 2:
        sums = output.double().sum(1)
        is_softmax = bool((output >= 0).all()) and bool(((sums - 1).abs() < _UNIT).all())
        return "values" if is_softmax else "logits"
    return "values"
