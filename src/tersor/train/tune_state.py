"""Everything that training steps change, as it was, and back again.

Values are copied back in place: parameters stay the same objects at the same addresses, so that an
optimizer's groups, schedulers and recorded work stay valid.
"""

import copy
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_PLAIN = (bool, int, float, str, type(None))
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


@dataclass(frozen=True, slots=True)
class _Kept:
    """A value and a copy of it; of a tensor also the object itself, which stays in use."""

    value: Any
    copied: Any

    @classmethod
    def of(cls, value: Any) -> "_Kept":
        if isinstance(value, Tensor):
            return cls(value, value.detach().clone())
        return cls(None, copy.deepcopy(value))

    def restored(self) -> Any:
        """The same tensor with its old values, or a fresh copy of another value."""
        if isinstance(self.value, Tensor):
            self.value.data.copy_(self.copied)
            return self.value
        return copy.deepcopy(self.copied)


@dataclass(frozen=True, slots=True)
class Randomness:
    """State of all generators that a step or a loader may draw from without being given one."""

    python: Any
    numpy: Any
    cpu: Tensor
    cuda: tuple[Tensor, ...]
    generators: tuple[tuple[torch.Generator, Tensor], ...]

    @classmethod
    def now(cls, generators: Iterable[torch.Generator] = ()) -> "Randomness":
        """As they are; ``generators`` are those of the caller's loader."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(
            python=random.getstate(),
            numpy=np.random.get_state(),  # noqa: NPY002 - the one that the caller's code may use
            cpu=torch.get_rng_state(),
            cuda=tuple(cuda),
            generators=tuple((g, g.get_state()) for g in generators),
        )

    def restore(self) -> None:
        """Put all of them back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        for generator, state in self.generators:
            generator.set_state(state)


def seed_all(seed: int) -> None:
    """Seed the generators that steps draw from; only ever between two ``Randomness.restore``."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def generators_of(loader: object) -> tuple[torch.Generator, ...]:
    """The generators that a loader and its samplers own, each once."""
    places: list[Any] = [loader, getattr(loader, "sampler", None)]
    batch_sampler = getattr(loader, "batch_sampler", None)
    places += [batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = [getattr(place, "generator", None) for place in places]
    unique = {id(g): g for g in found if isinstance(g, torch.Generator)}
    return tuple(unique.values())


class Snapshot:
    """A model, its optimizer and scaler, gradients, modes and generators at one moment.

    What steps keep elsewhere (Python attributes of modules, data sets with a state of their own,
    generators that only the step function knows) is not seen.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: Any = None,
        generators: Iterable[torch.Generator] = (),
    ) -> None:
        self._optimizer, self._scaler = optimizer, scaler
        parameters = {id(p): p for p in model.parameters()}
        parameters |= {id(p): p for group in optimizer.param_groups for p in group["params"]}
        self.parameters: tuple[Tensor, ...] = tuple(parameters.values())
        self._values = [(p, p.detach().clone()) for p in self.parameters]
        self._gradients = [(p, p.grad, _copied(p.grad)) for p in self.parameters]
        self._modes = [(module, module.training) for module in model.modules()]
        self._buffers = [
            (module, name, _Kept.of(value))
            for module in model.modules()
            for name, value in module._buffers.items()  # noqa: SLF001 - also those that are not saved
        ]
        self._state = [(key, value, _state_of(value)) for key, value in optimizer.state.items()]
        self._groups = [
            {key: _Kept.of(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self._attributes = _plain_attributes(optimizer)
        self._scale = copy.deepcopy(scaler.state_dict()) if scaler is not None else None
        self._randomness = Randomness.now(generators)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; layouts that a switch gave to parameters stay."""
        for parameter, value in self._values:
            parameter.data.copy_(value)
        for parameter, gradient, kept_gradient in self._gradients:
            if gradient is not None and kept_gradient is not None:
                gradient.copy_(kept_gradient)
            parameter.grad = gradient
        for module, is_training in self._modes:
            module.training = is_training
        for module, name, kept in self._buffers:
            module._buffers[name] = kept.restored()  # noqa: SLF001
        self._restore_optimizer()
        if self._scaler is not None:
            self._scaler.load_state_dict(self._scale)
        self._randomness.restore()

    def _restore_optimizer(self) -> None:
        state = self._optimizer.state
        state.clear()
        for key, value, kept in self._state:
            if isinstance(kept, dict):
                value.clear()
                value.update({name: item.restored() for name, item in kept.items()})
                state[key] = value
            else:
                state[key] = kept.restored()
        for group, values in zip(self._optimizer.param_groups, self._groups, strict=True):
            for name in [n for n in group if n != "params" and n not in values]:
                del group[name]
            group.update({name: item.restored() for name, item in values.items()})
        for name in _plain_attributes(self._optimizer):
            if name not in self._attributes:
                delattr(self._optimizer, name)
        for name, value in self._attributes.items():
            setattr(self._optimizer, name, value)


def _copied(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.detach().clone()


def _state_of(value: Any) -> "dict[str, _Kept] | _Kept":
    if isinstance(value, dict):
        return {name: _Kept.of(item) for name, item in value.items()}
    return _Kept.of(value)


def _plain_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """Counters and flags that an optimizer keeps beside its state."""
    return {n: v for n, v in vars(optimizer).items() if isinstance(v, _PLAIN)}


@contextmanager
def without_hooks(optimizer: Optimizer) -> Iterator[int]:
    """Leave an optimizer's step hooks off for a while; gives their number.

    A hook may keep a state of its own, which no snapshot could put back.
    """
    kept = {name: vars(optimizer).get(name) for name in _HOOKS}
    for name in _HOOKS:
        setattr(optimizer, name, OrderedDict())
    try:
        yield sum(len(hooks or ()) for hooks in kept.values())
    finally:
        for name, hooks in kept.items():
            setattr(optimizer, name, OrderedDict() if hooks is None else hooks)
