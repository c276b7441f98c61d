"""One model of the zoo: how it is built and called. All weights are random, none is constant."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 2
SEED = 0


@dataclass(frozen=True, slots=True)
class ZooModel:
    """An architecture with random weights and an example.

    Attributes:
        name: Unique in the zoo: source and the source's own name.
        family: Models of one family are variants in width and depth.
        source: "families", "torchvision", "timm" or "transformers".
        kind: "cnn" or "transformer": which goal for the share of MACs it is held to.
        build: Gives the network in evaluation mode; the same weights every time.
        inputs: One batch of BATCH samples: positional (a tuple) or by name (a dict).
    """

    name: str
    family: str
    source: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...] | dict[str, Any]]


def built(
    make: Callable[[], nn.Module], inputs: Callable[[], tuple[Any, ...] | dict[str, Any]]
) -> Callable[[], nn.Module]:
    """``make`` with seeded weights, constants replaced, in evaluation mode."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = make().eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        scramble_(model)
        settle_(model, inputs())
        return model

    return build


def generator(seed: int = SEED) -> torch.Generator:
    """A fresh source of random numbers."""
    return torch.Generator().manual_seed(seed)


def scramble_(model: nn.Module) -> None:
    """Replace every constant parameter by random values.

    Layer scales of 1e-6, biases of 0 and norms' weights of 1 would hide a wrong pruning: a branch
    scaled by 1e-6 is below any tolerance, and zeros can be removed anywhere.
    """
    source = generator(1)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel():
            low, high = float(parameter.min()), float(parameter.max())
            if low == high:
                _fill_(parameter.data, zero=low == 0, source=source)


def settle_(model: nn.Module, inputs: tuple[Any, ...] | dict[str, Any]) -> None:
    """Give norms with statistics those of what they see, give or take, and a bias around 1.

    Statistics of (0, 1) let the signal of a deep random network die out: the output is the same
    for every input, and a wrong pruning of an early layer is not seen. Exact ones with a bias
    around 0 make it chaotic: float32 rounding grows to 9e-3 of the output in resnet152. With a
    bias around 1 and twice the variance rounding stays near 1e-6 and inputs still differ by 10 %.
    """
    source = generator(2)

    def settle(module: Any, args: tuple[Tensor, ...]) -> None:
        rows = args[0].transpose(0, 1).flatten(1)  # [c, b * space]
        mean, var = rows.mean(1), rows.var(1)
        # Pooled maps hold two values a channel, often alike: nothing is amplified tenfold.
        var = var + float(var.mean()) + 0.01 * mean.square() + 1e-6
        module.running_mean.copy_(mean + 0.2 * var.sqrt() * _around_0(mean, source))
        module.running_var.copy_(var * (1 + 0.2 * _around_0(mean, source)))
        if module.bias is not None:
            module.bias.copy_(1 + 0.1 * torch.randn(mean.shape, generator=source))

    normed = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    hooks = [module.register_forward_pre_hook(settle) for module in normed]
    if hooks:
        with torch.no_grad():
            model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    for hook in hooks:
        hook.remove()


def _around_0(like: Tensor, source: torch.Generator) -> Tensor:
    """Uniform in [-1, 1)."""
    return 2 * torch.rand(like.shape, generator=source) - 1


def _fill_(tensor: Tensor, *, zero: bool, source: torch.Generator) -> None:
    """Biases around 0, scales around 0.75: residual sums of many layers stay finite."""
    if zero:
        tensor.copy_(0.05 * torch.randn(tensor.shape, generator=source))
    else:
        tensor.copy_(0.5 + 0.5 * torch.rand(tensor.shape, generator=source))


def floats(*shape: int, seed: int = SEED) -> Tensor:
    """Standard normal values [BATCH, *shape]."""
    return torch.randn((BATCH, *shape), generator=generator(seed))


def tokens(length: int, vocabulary: int, seed: int = SEED) -> Tensor:
    """Token numbers [BATCH, length], none of them 0 to 3, which often are special."""
    return torch.randint(4, vocabulary, (BATCH, length), generator=generator(seed))


def picture(size: int) -> Callable[[], tuple[Any, ...]]:
    """One square colour picture a sample."""
    return lambda: (floats(3, size, size),)


def clip(frames: int, size: int) -> Callable[[], tuple[Any, ...]]:
    """One colour clip a sample: [BATCH, 3, frames, size, size]."""
    return lambda: (floats(3, frames, size, size),)
