"""A pair of thinner layers in the place of one, in the user's own module and in their optimizer."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.ops.factor_costs import LayerSizes
from tersor.ops.factor_pairs import FactorPair
from tersor.ops.rank_forms import Form, factor_shapes

Undo = Callable[[], None]


def blank_pair(module: nn.Module, form: Form, rank: int) -> nn.Sequential:
    """A pair of a form and a rank with weights of zeros, in a layer's type and on its device.

    The second one has the layer's own bias, the same ``Parameter``.
    """
    assert isinstance(module, nn.Linear | nn.Conv2d)
    if isinstance(module, nn.Linear):
        shapes = factor_shapes(
            LayerSizes(outputs=module.out_features, inputs=module.in_features), form, rank
        )
    else:
        sizes = LayerSizes(
            outputs=module.out_channels, inputs=module.in_channels, kernel=tuple(module.kernel_size)
        )
        shapes = factor_shapes(sizes, form, rank)
    first, last = (torch.zeros(1, *shape, dtype=torch.float64) for shape in shapes)
    kernel = () if isinstance(module, nn.Linear) else tuple(module.kernel_size)
    return pair_modules(module, FactorPair(form=form, kernel=kernel, first=first, last=last))


def pair_modules(module: nn.Module, pair: FactorPair) -> nn.Sequential:
    """Two layers that compute a pair of factors, in a layer's type and on its device.

    Args:
        module: The layer; read only. The second one takes its bias, the same ``Parameter``.
        pair: Its factors.
    """
    if isinstance(module, nn.Linear):
        made: list[nn.Linear | nn.Conv2d] = [
            _linear(pair.first[0], module),
            _linear(pair.last[0], module),
        ]
    else:
        assert isinstance(module, nn.Conv2d)
        assert not isinstance(module.padding, str)
        steps = pair.steps(module.stride, module.padding, module.dilation)
        made = [
            _convolution(factor[0], shape, geometry, module)
            for factor, (shape, geometry) in zip((pair.first, pair.last), steps, strict=True)
        ]
    made[1].bias = module.bias
    found = nn.Sequential(*made)
    found.train(module.training)
    return found


def _linear(factor: Tensor, like: nn.Linear) -> nn.Linear:
    made = nn.Linear(factor.shape[1], factor.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(_as(factor, like.weight))
    return made


def _convolution(
    factor: Tensor, shape: tuple[int, ...], geometry: Any, like: nn.Conv2d
) -> nn.Conv2d:
    weight = factor.reshape(shape)
    made = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        geometry.kernel,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        bias=False,
        device="meta",
    )
    is_last = like.weight.is_contiguous(memory_format=torch.channels_last)
    value = _as(weight, like.weight)
    if is_last and prod(like.kernel_size) > 1:
        value = value.contiguous(memory_format=torch.channels_last)
    made.weight = nn.Parameter(value)
    return made


def _as(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, like.dtype).contiguous()


def put_in_place(model: nn.Module, name: str, module: nn.Module) -> Undo:
    """Another module under a name; what it returns puts the old one back."""
    path, _, leaf = name.rpartition(".")
    parent = model.get_submodule(path)
    old = parent._modules[leaf]  # noqa: SLF001
    parent._modules[leaf] = module  # noqa: SLF001

    def back() -> None:
        parent._modules[leaf] = old  # noqa: SLF001

    return back


def follow_(optimizer: Optimizer, name: str, old: nn.Module, pair: nn.Sequential) -> None:
    """The optimizer trains the pair's weights in the place of the layer's; their moments begin anew.

    Args:
        optimizer: Its groups and states are changed.
        name: Of the layer; where a group keeps names, they follow.
        old: The layer, whose weight is in one of the groups.
        pair: In its place.
    """
    weight, bias = old.get_parameter("weight"), pair[1]._parameters.get("bias")  # noqa: SLF001
    for group in optimizer.param_groups:
        at = next((i for i, p in enumerate(group["params"]) if p is weight), None)
        if at is not None:
            group["params"][at : at + 1] = [pair[0].weight, pair[1].weight]
            _follow_names(group, at, name)
    for parameter in (weight, bias):
        if parameter is not None:
            optimizer.state.pop(parameter, None)


def _follow_names(group: Mapping[str, Any], at: int, name: str) -> None:
    names = group.get("param_names")
    if names is None:
        return
    known = names[at].removesuffix("weight")
    names[at : at + 1] = [f"{known}0.weight", f"{known}1.weight"]
    for i, own in enumerate(names):
        if own == f"{name}.bias":
            names[i] = f"{name}.1.bias"
