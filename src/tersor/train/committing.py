"""The lossless commit: zero, ask, cut, ask again; undo where the answers differ."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tersor.core.errors import ConfigError, NumericalError
from tersor.train.counting import all_finite
from tersor.train.cutting import Selection, cut_
from tersor.train.groups import Group
from tersor.train.literals import literals_after
from tersor.train.parts import Parts
from tersor.train.sharding import Shard, follow_, gathered, is_sharded, largest, local
from tersor.train.states import cut_states_
from tersor.train.trial import TOLERANCE, difference_in_double, worst_difference
from tersor.train.units import Units


@dataclass
class Commit:
    """Units that are chosen for good.

    Attributes:
        kept: Group -> indices of the units that stay.
        difference: Largest, of the outputs' scale, between zeroed and cut.
        is_cut: Whether the model has lost the others.
    """

    parts: Parts
    kept: Mapping[str, Tensor]
    difference: float = 0.0
    is_cut: bool = False
    notes: list[str] = field(default_factory=list)
    _masks: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list, repr=False)

    def hold(self) -> None:
        """Behind a step: units that are gone but not cut yet stay zero."""
        if not self.is_cut and self._masks:
            torch._foreach_mul_([local(p) for p, _ in self._masks], [m for _, m in self._masks])

    def cut(self) -> bool:
        """Cut the model and the optimizer's states.

        Returns:
            Whether anything was cut: nothing is where all units stay, or where the outputs would change.
        """
        groups = self._shrinking()
        if not groups:
            self.is_cut = True
            return False
        parts = self.parts
        self.hold()
        model = gathered(parts.model) if parts.shard is not None else parts.model
        shapes = {p: p.shape for p in model.parameters()}
        wanted = parts.probe.run(model)
        if not self._is_sound(model, wanted):
            return False
        done = cut_(model, groups, self.kept, self._literals())
        worst = worst_difference(parts.probe.run(model), wanted)
        self.difference = largest(worst, parts.model)
        if not self.difference <= self._tolerance(wanted):
            done.undo()
            if not self._is_rounding(model, groups):
                self.notes.append(
                    f"cutting changed the outputs by {self.difference:.1e} of their scale and was undone: "
                    "the units stay, at zero"
                )
                return False
            done = cut_(model, groups, self.kept, self._literals())
        if parts.shard is None:
            self._follow(done.selections, shapes)
        else:
            self._reshard(parts.shard, model, done.selections)
        self.is_cut = True
        return True

    def _is_sound(self, model: nn.Module, outputs: list[Tensor]) -> bool:
        """Whether there are numbers to compare.

        Raises:
            NumericalError: Weights are none.
        """
        weights = dict(model.named_parameters())
        if not all_finite(list(weights.values())):
            bad = next(n for n, w in weights.items() if not all_finite([w]))
            raise NumericalError(
                f"{bad}: its weights are not finite, so that the small model would be of no use; go back to "
                "the last checkpoint, lower the learning rate, or clip gradients"
            )
        if all_finite([t for t in outputs if t.is_floating_point()]):
            return True
        self.difference = float("nan")
        self.notes.append(
            "in evaluation mode the outputs are not finite although the weights are, so that a cut can't be compared "
            "with them: the units stay, at zero; look at the running statistics of norms"
        )
        return False

    def _is_rounding(self, model: nn.Module, groups: list[Group]) -> bool:
        """Whether a difference is gone in float64; it is what ``difference`` says then."""
        if self.parts.shard is not None:  # every process would have to find the same
            return False
        exact = difference_in_double(model, self.parts.probe, groups, self.kept, self._literals())
        if exact is None or not exact <= TOLERANCE:
            return False
        self.notes.append(
            f"cutting changed the outputs by {self.difference:.1e} of their scale in the model's own floats and "
            f"by {exact:.1e} in float64: rounding, not the cut; inputs near 0 with a spread of 1 would avoid it"
        )
        self.difference = exact
        return True

    def _reshard(
        self, shard: Shard, plain: nn.Module, selections: Mapping[str, tuple[Selection, ...]]
    ) -> None:
        """The cut copy takes the model's place, in rows again."""
        given = shard(plain)
        model = given if isinstance(given, nn.Module) else plain
        if not is_sharded(model):
            raise ConfigError(
                "shard: found a model that is not sharded after it, wanted one that fully_shard was called on"
            )
        self.notes += follow_(self.parts.optimizer, self.parts.model, model, selections)
        self.parts = replace(self.parts, outer=model, model=model)
        self._masks = []

    def _tolerance(self, outputs: list[Tensor]) -> float:
        """More in half precision: as many roundings of that size."""
        kinds = [t.dtype for t in outputs if t.is_floating_point()]
        worst = max((torch.finfo(k).eps for k in kinds), default=torch.finfo(torch.float32).eps)
        return TOLERANCE * max(1.0, worst / torch.finfo(torch.float32).eps)

    def restore(self) -> None:
        """Cut a fresh model to a checkpoint's structure; its weights are loaded by the caller."""
        groups = self._shrinking()
        self.is_cut = True
        if not groups:
            return
        shapes = {p: p.shape for p in self.parts.model.parameters()}
        done = cut_(self.parts.model, groups, self.kept, self._literals())
        self._follow(done.selections, shapes)

    def _literals(self) -> dict[str, dict[str, int]]:
        return literals_after(self.parts.structure.axes, self.kept)

    def _follow(
        self,
        selections: Mapping[str, tuple[tuple[int, Tensor], ...]],
        shapes: Mapping[nn.Parameter, torch.Size],
    ) -> None:
        named = dict(self.parts.model.named_parameters(remove_duplicate=False))
        cuts = {named[n]: rows for n, rows in selections.items() if n in named}
        self.notes += cut_states_(self.parts.optimizer, cuts, shapes)
        self.parts.rounding.follow(cuts)
        self._masks = []

    def _shrinking(self) -> list[Group]:
        groups = self.parts.structure.groups
        return [g for n, g in groups.items() if len(self.kept[n]) < g.units]


def commit(parts: Parts, units: Units, kept: Mapping[str, Tensor]) -> Commit:
    """Units that stay for good; the others are held at zero until they are cut."""
    flags = {}
    for name, group in parts.structure.groups.items():
        if len(kept[name]) < group.units:
            stay = torch.zeros(group.units)
            stay[kept[name]] = 1.0
            flags[name] = stay.to(units.made[0].units.device)
    made = Commit(parts, kept)
    made._masks = units.factors(flags)  # noqa: SLF001
    return made
