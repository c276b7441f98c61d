"""What is asked of a model's own tensors, and copies of it in float32."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import WeightError

_HALF = (torch.float16, torch.bfloat16)


def check_weights(model: nn.Module) -> None:
    """Refuse what no stage can work with.

    Raises:
        WeightError: A parameter or buffer that is complex, sparse, empty, without values, not
            finite or of another float type; names it.
    """
    parameters = {id(p) for p in model.parameters()}
    for name, tensor in _tensors(model):
        if tensor.is_complex() or tensor.layout != torch.strided:
            raise WeightError(
                f"{name}: complex and sparse weights are not supported; make it dense and real "
                "(to_dense(), torch.view_as_real)"
            )
        if tensor.is_meta:
            raise WeightError(f"{name} has no values (meta device); load the weights first")
        if id(tensor) in parameters and not tensor.numel():
            raise WeightError(
                f"{name}: found shape {tuple(tensor.shape)}, which holds no value; wanted every "
                "size to be at least 1: remove that layer"
            )
        _check_values(name, tensor)


def _check_values(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    is_parameter = isinstance(tensor, nn.Parameter)
    if is_parameter and tensor.dtype not in (torch.float32, *_HALF):
        raise WeightError(
            f"{name}: the model's weights are {str(tensor.dtype).removeprefix('torch.')}; wanted "
            "float32, float16 or bfloat16: call model.float() on a copy"
        )
    bad = int((~torch.isfinite(tensor.float())).sum())
    if bad and (is_parameter or not _is_mask(tensor)):  # masks hold -inf on purpose
        raise WeightError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; wanted finite "
            "weights: load a sound checkpoint"
        )


def _is_mask(tensor: Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == -torch.inf)).all())


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def float_type(model: nn.Module) -> torch.dtype:
    """The type of the model's float parameters: the first half type among them, else float32."""
    found = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return next((d for d in found if d in _HALF), torch.float32)


def on_cpu(model: nn.Module) -> nn.Module:
    """The model, or a copy of it where it is elsewhere."""
    if all(t.device.type == "cpu" for _, t in _tensors(model)):
        return model
    return copied(model).to("cpu")


def in_float32(model: nn.Module) -> nn.Module:
    """The model, or a copy with all float tensors in float32."""
    if all(t.dtype not in _HALF for _, t in _tensors(model)):
        return model
    return copied(model).float()


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; weights that a hook computes (weight_norm) refuse to be copied as they are."""
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def state_restored(model: nn.Module) -> Iterator[None]:
    """Buffers and tensor attributes that the model writes to while it runs are put back after."""
    modules = list(model.modules())
    buffers = [dict(module._buffers) for module in modules]  # noqa: SLF001
    attributes = [{k: v for k, v in vars(m).items() if isinstance(v, Tensor)} for m in modules]
    groups: list[dict[str, Any]] = [*buffers, *attributes]
    held = {id(t): t for one in groups for t in one.values() if t is not None}
    kept = [(t, t._version, t.detach().clone()) for t in held.values() if not t.is_inference()]  # noqa: SLF001
    try:
        yield
    finally:
        for module, names, values in zip(modules, buffers, attributes, strict=True):
            module._buffers.update(names)  # noqa: SLF001
            for name in [k for k, v in vars(module).items() if isinstance(v, Tensor)]:
                if name not in values:
                    delattr(module, name)
            vars(module).update(values)
        with torch.no_grad():
            for tensor, version, value in kept:
                if tensor._version != version:  # noqa: SLF001
                    tensor.copy_(value)
