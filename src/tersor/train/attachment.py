"""What the callbacks of trainers share: attach late, restore the structure early."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from tersor.core.errors import ConfigError
from tersor.train.attaching import SPECTRAL, attach, resumed
from tersor.train.attaching_spectral import Dense, restore_spectral
from tersor.train.cutting import cut_
from tersor.train.factorizer import Factorizer
from tersor.train.literals import literals_after
from tersor.train.report import Report
from tersor.train.resuming import check_structure
from tersor.train.shrinker import Shrinker
from tersor.train.structure import NO_WIDTHS, Structure, find_structure


@dataclass
class Attachment:
    """A shrinker that is made when a trainer begins.

    Attributes:
        example: One batch of the model's inputs.
        options: Of ``attach``, but for ``total_steps``, which the trainer knows.
        shrinker: Once there is one.
    """

    example: Any
    options: Mapping[str, Any]
    shrinker: Shrinker | Factorizer | None = None
    _state: Mapping[str, Any] | None = field(default=None, repr=False)
    _structure: Structure | Dense | None = field(default=None, repr=False)

    def restore(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Give a fresh model the structure of a checkpoint, before its weights are loaded.

        Raises:
            ConfigError: The checkpoint is of another structure.
        """
        keep: Sequence[str] = self.options.get("keep", ())
        if self.options.get("algorithm") == SPECTRAL:
            self._structure = restore_spectral(model, self.example, keep, state)
            self._state = state
            return
        has_widths = any(self.options.get(n) is not None for n in ("target", "counts"))
        structure = find_structure(model, self.example, keep=keep) if has_widths else NO_WIDTHS
        check_structure(state, structure)
        if state["is_cut"] and has_widths:
            kept = state["kept"]
            groups = [g for n, g in structure.groups.items() if len(kept[n]) < g.units]
            cut_(model, groups, kept, literals_after(structure.axes, kept))
        self._structure, self._state = structure, state

    def begin(
        self, model: nn.Module, optimizer: Optimizer, total_steps: int
    ) -> Shrinker | Factorizer:
        """Attach, or go on from the state that was restored."""
        state = self._state
        if state is not None and state["total_steps"] != total_steps:
            raise ConfigError(
                f"checkpoint: it is of a run of {state['total_steps']} steps, this one has "
                f"{total_steps}; resume with the same number of epochs or steps"
            )
        if state is None or self._structure is None or not state["is_cut"]:
            self.shrinker = attach(
                model, optimizer, self.example, total_steps=total_steps, **self.options
            )
            if state is not None:
                self.shrinker.load_state_dict(state)
            return self.shrinker
        self.shrinker = resumed(
            model,
            optimizer,
            self.example,
            self._structure,
            state,
            self.options,
        )
        return self.shrinker

    def finish(
        self, validate: Callable[[nn.Module], float] | None = None
    ) -> tuple[nn.Module, Report]:
        """As of the shrinker.

        Raises:
            ConfigError: No training has begun.
        """
        if self.shrinker is None:
            raise ConfigError("finish(): found no training run yet; call it after the trainer's")
        return self.shrinker.finish(validate)
