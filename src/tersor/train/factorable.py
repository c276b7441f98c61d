"""Layers of a model that a pair of thinner ones can replace, and why the others can't be.

A linear layer becomes two; a convolution the whole kernel to few channels and 1 x 1 from there, or its rows and
then its columns, or the other way round (``ops.rank_forms``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.capture.weights import copied
from tersor.ops.factor_costs import LayerSizes
from tersor.ops.rank_forms import Form, forms_of, rank_limit
from tersor.train.groups import Held
from tersor.train.pairs import blank_pair, put_in_place
from tersor.train.probe import Probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer that a pair can replace.

    Attributes:
        name: Path of its module.
        positions: That it writes for the probe's batch: rows of a linear layer, places of a convolution.
    """

    name: str
    sizes: LayerSizes
    positions: int = 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """Of a convolution; empty for a linear layer."""
        return self.sizes.kernel

    @property
    def weights(self) -> int:
        """Elements of its weight."""
        return self.sizes.outputs * self.sizes.inputs * prod(self.kernel)

    def forms(self, rank: int) -> tuple[Form, ...]:
        """The forms in which a pair of this rank is smaller than the layer, and computes less."""
        return tuple(f for f in forms_of(self.kernel) if rank <= rank_limit(self.sizes, f))

    @property
    def most(self) -> int:
        """The largest rank of which some pair is smaller."""
        return max(rank_limit(self.sizes, form) for form in forms_of(self.kernel))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """Of one model.

    Attributes:
        by_name: Those that can be replaced.
        held: Those that can't, and why.
        macs: Multiply-accumulates of all linear layers and convolutions for the probe's batch.
    """

    by_name: Mapping[str, Layer]
    held: tuple[Held, ...]
    macs: int

    def why_not(self, name: str) -> str | None:
        """Why a layer can't be replaced; None where it can."""
        if name in self.by_name:
            return None
        return next((h.reason for h in self.held if h.name == name), "there is no such layer")


def find_layers(
    model: nn.Module, optimizer: Optimizer | None, probe: Probe, keep: Sequence[str] = ()
) -> Layers:
    """The layers of a model that pairs can replace; it is not changed.

    Args:
        model: The plain module.
        optimizer: That trains it; None: all weights count as trained.
        probe: One batch.
        keep: Names of layers, or beginnings of them, to leave whole.
    """
    positions = _positions(model, probe)
    own = None
    if optimizer is not None:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, Layer] = {}
    held: list[Held] = []
    macs = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or name not in positions:
            continue
        macs += module.weight.numel() * positions[name]
        made = _layer(name, module, positions[name])
        reason = made if isinstance(made, str) else _why_whole(model, name, own, keep)
        if reason is not None:
            held.append(Held(name, reason))
        elif isinstance(made, Layer):
            found[name] = made
    fine, refused = _tried(model, probe, found)
    return Layers(by_name=fine, held=(*held, *refused), macs=macs)


def _positions(model: nn.Module, probe: Probe) -> dict[str, int]:
    """Layer -> positions that it writes for the probe's batch; those that are never called are absent."""
    found: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):

            def count(module: nn.Module, _: object, output: Tensor, name: str = name) -> None:
                channels = module.get_parameter("weight").shape[0]
                found[name] = found.get(name, 0) + output.numel() // channels

            handles.append(module.register_forward_hook(count))
    try:
        probe.run(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _layer(name: str, module: nn.Linear | nn.Conv2d, positions: int) -> Layer | str:
    """A layer by its sizes, or why it has no pair."""
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"it is a {type(module).__name__}, of whose code nothing is known"
    if isinstance(module, nn.Linear):
        sizes = LayerSizes(outputs=module.out_features, inputs=module.in_features)
    else:
        if module.groups != 1:
            return f"a convolution of {module.groups} groups"
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return f"its padding is {module.padding_mode!r}, {module.padding!r}: wanted zeros, by number"
        sizes = LayerSizes(
            outputs=module.out_channels,
            inputs=module.in_channels,
            kernel=tuple(module.kernel_size),
            positions_in=tuple(module.stride),
            positions_out=(1, 1),
        )
    made = Layer(name=name, sizes=sizes, positions=positions)
    return made if made.most >= 1 else "no pair of it is smaller"


def _why_whole(
    model: nn.Module, name: str, own: set[int] | None, keep: Sequence[str]
) -> str | None:
    module = model.get_submodule(name)
    weight = module._parameters.get("weight")  # noqa: SLF001
    if weight is None:
        return "its weight is computed, not stored"
    if any(name == k or name.startswith(f"{k}.") for k in keep):
        return "named in keep"
    if not weight.requires_grad:
        return "its weight is frozen"
    if own is not None and id(weight) not in own:
        return "its weight is in no group of the optimizer"
    if module._forward_hooks or module._forward_pre_hooks:  # noqa: SLF001
        return "it has hooks, which a pair would not call"
    every = model.named_modules(remove_duplicate=False)
    if sum(m is module for _, m in every) > 1:
        return "its module stands in several places"
    homes = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    return f"its weight is tied: {', '.join(homes[:3])}" if len(homes) > 1 else None


def _tried(
    model: nn.Module, probe: Probe, found: Mapping[str, Layer]
) -> tuple[dict[str, Layer], list[Held]]:
    """The layers whose model runs with a pair in their place: code may read a layer's own weight."""
    trial = copied(model)
    if _why_not(trial, probe, list(found.values())) is None:
        return dict(found), []
    fine: dict[str, Layer] = {}
    refused: list[Held] = []
    for name, layer in found.items():
        reason = _why_not(trial, probe, [layer])
        if reason is None:
            fine[name] = layer
        else:
            refused.append(Held(name, reason))
    return fine, refused


def _why_not(trial: nn.Module, probe: Probe, layers: Sequence[Layer]) -> str | None:
    undo = []
    try:
        for layer in layers:
            pair = blank_pair(trial.get_submodule(layer.name), forms_of(layer.kernel)[0], 1)
            undo.append(put_in_place(trial, layer.name, pair))
        probe.run(trial)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
        line = str(error).strip().splitlines() or [type(error).__name__]
        return f"forward() fails with a pair in its place: {line[0]}"
    finally:
        for back in reversed(undo):
            back()
    return None


def device_of(model: nn.Module) -> torch.device:
    """Of the first parameter."""
    first = next(iter(model.parameters()), None)
    return torch.device("cpu") if first is None else first.device
