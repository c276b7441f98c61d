"""What the outputs mean: the geometry in which changes are measured."""

import warnings

from torch import Tensor

from tersor.core.errors import DataError
from tersor.core.records import OutputKind

_UNIT = 1e-3


def output_kind(stated: OutputKind | None, outputs: tuple[Tensor, ...]) -> OutputKind:
    """The stated geometry, or one inferred from a few outputs, with a warning.

    Raises:
        DataError: Nothing among the outputs is a float tensor.
    """
    floats = [t for t in outputs if t.is_floating_point() and t.dim() > 0]
    if not floats:
        raise DataError("the model returns no float tensor, so a change of its output has no size")
    if stated is not None:
        return stated
    kind = _infer(floats[0])
    warnings.warn(
        f"the geometry of the outputs was inferred as {kind!r} from a shape of "
        f"{tuple(floats[0].shape)}; say tersor.Data(..., output='logits' | 'embedding' | 'values')",
        stacklevel=4,
    )
    return kind


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
