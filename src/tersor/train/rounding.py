"""Weights of 4, 3 or 2 bits out of training: pulled to a grid ever harder, then on it.

Per step, as for units that die (``regrow``): the weights take their latents' place, the optimizer makes its
step with the gradient at the pulled weights (straight-through), what it gives is the new latent, and the
weights are pulled again. Softness falls from 1 (the latents themselves) to 0 (the grid) over the window.
A grid has a step an output, the one of least squared error, which is looked for anew every few steps until
the weights lie on it; then it stays. It is a step of the packing of files (``graph.low_bits``): float16, of
either sign.

Source: Jin et al. 2025, arXiv:2503.15748 (``ops.parq``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.core.errors import ConfigError, NumericalError
from tersor.ops.group_grids import GroupGrid, fit_steps
from tersor.ops.parq import pulled
from tersor.train.cutting import Selection
from tersor.train.groups import Held
from tersor.train.schedule import FEWEST_LOOKS, Schedule

BITS = (4, 3, 2)
LEAST_WEIGHTS = 1024  # as of files: packing a smaller one saves nothing
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TYPES = (torch.float32, torch.float64)  # in which code times step is exact


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Coded:
    """One weight that is to have few bits.

    Attributes:
        layer: Path of its module.
        parameter: The weight, outputs first.
    """

    layer: str
    parameter: nn.Parameter
    bits: int

    @property
    def grid(self) -> GroupGrid:
        """One float16 step an output."""
        return GroupGrid(bits=self.bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """One layer whose weight lies on a grid.

    Attributes:
        weights: How many.
        distance: Root of the mean squared distance from the latent weights, of their root mean square.
    """

    layer: str
    bits: int
    weights: int
    distance: float


@dataclass
class Rounding:
    """The weights of a run that are to have few bits; without any it does nothing.

    Attributes:
        coded: Which.
        held: Layers that stay as they are, and why.
        first, last: Steps that are done when the pull begins, and when the weights lie on the grid.
        every: Steps between two searches for the grid's steps.
        is_open: Whether the weights are the latents.
    """

    coded: tuple[Coded, ...] = ()
    held: tuple[Held, ...] = ()
    first: int = 0
    last: int = 0
    every: int = 1
    is_open: bool = True
    is_shared: bool = False  # over processes: the first one's steps are taken
    _latents: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _steps: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def bits(self) -> dict[str, int]:
        """Layer -> bits."""
        return {c.layer: c.bits for c in self.coded}

    def softness(self, step: int) -> float:
        """How much of a latent's place between two points is left after so many steps."""
        share = (step - self.first) / max(1, self.last - self.first)
        return 1 - min(1.0, max(0.0, share))

    def before(self) -> None:
        """In front of the optimizer's step: it changes the latents."""
        for coded in self.coded if self._latents else ():
            found, wanted = coded.parameter.shape, self._latents[coded.layer].shape
            if found != wanted:
                raise ConfigError(
                    f"{coded.layer}: its weight of {tuple(wanted)} has become {tuple(found)} after attach(); "
                    "change the model first and attach then"
                )
        self.reveal()

    def reveal(self) -> None:
        """The latents in the weights' place."""
        if not self.is_open and self._latents:
            latents = [self._latents[c.layer] for c in self.coded]
            torch._foreach_copy_([c.parameter.data for c in self.coded], latents)
        self.is_open = True

    def after(self, step: int) -> None:
        """Behind the optimizer's step, of which so many are done: the weights are the latents.

        Raises:
            NumericalError: A weight is no number.
        """
        self.is_open = True
        if step < self.first or not self.coded:
            return
        is_search = not self._steps or step == self.last or (step - self.first) % self.every == 0
        if is_search and not (self._steps and step > self.last):
            self.search(step)
        self.hide(step)

    def hide(self, step: int) -> None:
        """The weights as they are pulled; what they were is kept as latents."""
        if self.is_open and self._steps:
            softness = self.softness(step)
            for coded in self.coded:
                weight = coded.parameter.data
                latent = self._latents.get(coded.layer)
                if latent is None:
                    latent = self._latents[coded.layer] = torch.empty_like(weight)
                latent.copy_(weight)
                low, high = coded.grid.low, coded.grid.high
                weight.copy_(
                    pulled(latent, self._steps[coded.layer], low=low, high=high, softness=softness)
                )
            self.is_open = False

    def search(self, step: int) -> None:
        """Steps of the least squared error for the weights as they are; reads values from the device."""
        sound = torch.stack([torch.isfinite(c.parameter.detach()).all() for c in self.coded])
        if not bool(sound.all()):
            bad = [c.layer for c, fine in zip(self.coded, sound.tolist(), strict=True) if not fine]
            raise NumericalError(
                f"step {step}: the weights of {', '.join(bad[:3])} are not finite, so that there is no grid "
                "for them; go back to the last checkpoint, lower the learning rate, or clip gradients"
            )
        for coded in self.coded:
            rows = coded.parameter.detach().flatten(1).unsqueeze(0)
            found = fit_steps(rows, coded.grid).step[0, :, 0]
            found = found.to(coded.parameter.dtype).contiguous()
            if self.is_shared:
                torch.distributed.broadcast(found, src=0)
            self._steps[coded.layer] = found

    def follow(self, cuts: Mapping[nn.Parameter, Sequence[Selection]]) -> None:
        """Outputs were cut, and so are their steps; the weights are the latents.

        Args:
            cuts: Parameter -> what stays of each dimension that changed.
        """
        for coded in self.coded if self._steps else ():
            for dim, index in cuts.get(coded.parameter, ()):
                if dim == 0:
                    step = self._steps[coded.layer]
                    self._steps[coded.layer] = step[index.to(step.device)]

    def resize(self, step: int) -> None:
        """The model may have been cut; the weights are the latents."""
        self._latents = {}
        self.hide(step)

    def note(self, step: int) -> tuple[str, ...]:
        """What to say where the run ends after so many steps."""
        if not self.coded or step >= self.last:
            return ()
        said = (
            f"finish() was called after {step} steps, before step {self.last} from which weights would have "
            "lain on their grid: they were rounded at once"
        )
        return (said,)

    def harden(self) -> tuple[Rounded, ...]:
        """The end: the weights lie on the grid, latents are gone."""
        if self.coded and not self._steps:
            self.search(self.last)
        self.reveal()
        self.hide(self.last)
        found = tuple(self._rounded(c) for c in self.coded)
        self._latents = {}
        return found

    def _rounded(self, coded: Coded) -> Rounded:
        latent, weight = self._latents[coded.layer], coded.parameter.detach()
        size = float(latent.square().mean().sqrt())
        off = float((weight - latent).square().mean().sqrt())
        return Rounded(
            layer=coded.layer,
            bits=coded.bits,
            weights=weight.numel(),
            distance=off / size if size > 0 else 0.0,
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that ``load`` takes."""
        return {
            "bits": self.bits(),
            "latents": {n: t.detach().cpu() for n, t in self._latents.items()},
            "steps": {n: t.cpu() for n, t in self._steps.items()},
            "is_open": self.is_open,
        }

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a saved state; the weights are loaded by the caller.

        Raises:
            ConfigError: It is of other layers or bits.
        """
        found = {} if state is None else dict(state["bits"])
        if state is None or found != self.bits():
            wrong = sorted(set(found.items()) ^ set(self.bits().items()))[:4]
            raise ConfigError(
                f"checkpoint: its run had other bits; layers that differ: {wrong}; attach with the same bits="
            )
        devices = {c.layer: c.parameter.device for c in self.coded}
        # Copies: latents change in place, and the caller may load the same state again.
        self._latents = {n: t.to(devices[n], copy=True) for n, t in state["latents"].items()}
        self._steps = {n: t.to(devices[n], copy=True) for n, t in state["steps"].items()}
        self.is_open = bool(state["is_open"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which weights are to have how many bits.

    Attributes:
        bits: Of all layers that can have few, or layer -> bits.
        keep: Names of layers, or beginnings of them, to leave as they are.
        known: Layers of a run that goes on: they may have become smaller than what is worth it.
    """

    bits: int | Mapping[str, int]
    keep: Sequence[str] = ()
    known: Sequence[str] = ()


def rounding_of(
    model: nn.Module,
    optimizer: Optimizer,
    wanted: Wanted,
    schedule: Schedule,
    *,
    begin: int,
) -> Rounding:
    """The weights of a model that are to have few bits.

    Args:
        model: The plain module.
        optimizer: That trains it.
        wanted: Of which layers how many bits.
        schedule: Of the run; the weights lie on the grid at ``hard``.
        begin: Steps that are done when the pull begins.

    Raises:
        ConfigError: Bits that there are not, a layer that can't have them, none that can, or too few steps.
    """
    bits = wanted.bits
    _check_bits(bits)
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    reasons = {
        n: _why_whole(model, n, own, wanted.keep)
        or (None if n in wanted.known else _why_small(model, n))
        for n in _layers(model)
    }
    fine = [n for n, reason in reasons.items() if reason is None]
    if not isinstance(bits, Mapping):
        bits = dict.fromkeys(fine, bits)
    for layer in bits:
        why = reasons.get(layer, "it is no linear layer or convolution")
        if why is not None:
            raise ConfigError(
                f"bits: {layer!r} can't have few bits: {why}; there are {', '.join(fine[:8])}"
            )
    held = tuple(Held(n, reason) for n, reason in reasons.items() if reason is not None)
    if not bits:
        some = "; ".join(f"{h.name}: {h.reason}" for h in held[:5])
        raise ConfigError(
            f"bits: found no layer that can have few bits{f' ({some})' if some else ''}"
        )
    coded = tuple(
        Coded(layer=n, parameter=model.get_submodule(n).get_parameter("weight"), bits=bits[n])
        for n in fine
        if n in bits
    )
    _check_window(begin, schedule)
    return Rounding(
        coded=coded,
        held=held,
        first=begin,
        last=schedule.hard_step,
        every=schedule.every,
    )


def _check_bits(bits: int | Mapping[str, int]) -> None:
    for value in bits.values() if isinstance(bits, Mapping) else (bits,):
        if type(value) is not int or value not in BITS:
            raise ConfigError(
                f"bits: found {value!r}, wanted one of {', '.join(map(str, BITS))}; 8 bits lose next to nothing "
                "without training: give the result to tersor.compress"
            )


def _layers(model: nn.Module) -> list[str]:
    """Paths of the modules that multiply by a weight."""
    return [n for n, m in model.named_modules() if isinstance(m, _KINDS)]


def _why_whole(model: nn.Module, layer: str, own: set[int], keep: Sequence[str]) -> str | None:
    """Why a layer's weight stays as it is; None where it need not."""
    module = model.get_submodule(layer)
    weight = module._parameters.get("weight")  # noqa: SLF001
    if weight is None:
        return "its weight is computed, not stored"
    if any(layer == k or layer.startswith(f"{k}.") for k in keep):
        return "named in keep"
    if not weight.requires_grad:
        return "its weight is frozen"
    if id(weight) not in own:
        return "its weight is in no group of the optimizer"
    if weight.dtype not in _TYPES:
        return f"{weight.dtype} does not hold code times step; train with autocast from float32 weights"
    homes = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    return f"its weight is tied: {', '.join(homes[:3])}" if len(homes) > 1 else None


def _why_small(model: nn.Module, layer: str) -> str | None:
    count = model.get_submodule(layer).get_parameter("weight").numel()
    if count >= LEAST_WEIGHTS:
        return None
    return f"{count} weights: fewer than {LEAST_WEIGHTS} are not packed in files either"


def _check_window(begin: int, schedule: Schedule) -> None:
    steps = schedule.hard_step - begin
    if steps < FEWEST_LOOKS * schedule.every:
        raise ConfigError(
            f"total_steps={schedule.total_steps} is too small for bits: {steps} steps from step {begin} to "
            f"{schedule.hard:.0%} of the run, wanted {FEWEST_LOOKS * schedule.every}; train for longer, or set "
            f"every={max(1, steps // FEWEST_LOOKS)} in the schedule"
        )
