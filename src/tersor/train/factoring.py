"""The pairs of a run: which layers get one, putting them in place, and the way back."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tersor.ops.factor_costs import height_cost, output_cost, width_cost
from tersor.ops.moments import Moments
from tersor.ops.objective import Objective
from tersor.ops.rank_forms import Form, as_form
from tersor.train.fitting import Fitted, fitted, loss_of, objective_for
from tersor.train.pairs import Undo, blank_pair, follow_, put_in_place
from tersor.train.rank_planning import Ranks
from tersor.train.ranks import is_replicated, sent
from tersor.train.spectral_parts import SpectralParts

# Of the outputs' own size (root mean square over the probe): more is worse than no output at all.
WORST = 1.0
_COSTS = {"output": output_cost, "height": height_cost, "width": width_cost}


@dataclass(frozen=True, slots=True, kw_only=True)
class Factored:
    """One layer that can be replaced.

    Attributes:
        rank: Of the pair in its place; 0: it stays whole.
        form: Of the pair (``ops.rank_forms``).
        loss: Share of the variance of the layer's outputs that was lost when it was put in place.
        reason: Why it stays whole.
    """

    layer: str
    rank: int
    form: str
    loss: float
    reason: str = ""


@dataclass
class Factoring:
    """Pairs in a model.

    Attributes:
        done: Layer -> its pair.
        reasons: Layer -> why it was put back.
        difference: Of the outputs on the probe, before and after: root mean square, of their own.
    """

    parts: SpectralParts
    done: dict[str, Factored] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    difference: float = 0.0

    def plan(self, moments: Mapping[str, Moments]) -> Ranks:
        """The ranks as they were given, or as the planner finds them for the weights as they are."""
        parts = self.parts
        if parts.planner is None:
            assert parts.counts is not None
            return Ranks(chosen={n: (rank, None) for n, rank in parts.counts.items()}, reasons={})
        known: dict[str, Objective] = {}

        def loss(name: str, form: Form, rank: int) -> float:
            layer = parts.layers.by_name[name]
            if name not in known:
                known[name] = objective_for(layer, parts.model.get_submodule(name), moments[name])
            return loss_of(known[name], layer, form, rank)

        found = [parts.planner.ranks(loss)]
        if is_replicated(parts.outer):  # each process has measured prices of its own
            torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def replace(self, plan: Ranks, moments: Mapping[str, Moments]) -> tuple[str, ...]:
        """Put the pairs of a plan in place, or nothing where the outputs do not stand it.

        Returns:
            Notes.

        Raises:
            NumericalError: A weight or an input is no number.
        """
        parts = self.parts
        if not plan.chosen:
            return ()
        wanted = parts.probe.run(parts.model)
        undo: list[Undo] = []
        old: dict[str, nn.Module] = {}
        rows: dict[str, Factored] = {}
        for name, (rank, form) in plan.chosen.items():
            layer, module = parts.layers.by_name[name], parts.model.get_submodule(name)
            objective = objective_for(layer, module, moments[name])
            forms = layer.forms(rank) if form is None else (form,)
            pair = fitted(layer, module, objective, rank, forms)
            if is_replicated(parts.outer):
                sent([m.get_parameter("weight").data for m in pair.modules], pair.shift)
            undo += [_shift_(module, pair), put_in_place(parts.model, name, pair.modules)]
            old[name] = module
            rows[name] = Factored(layer=name, rank=rank, form=pair.pair.form, loss=pair.loss)
        self.difference = _off(parts.probe.run(parts.model), wanted)
        if not self.difference <= WORST:
            for back in reversed(undo):
                back()
            self.reasons = dict.fromkeys(rows, "undone: the outputs did not stand it")
            said = (
                f"pairs changed the outputs by {self.difference:.2f} of their size (at most {WORST} is taken) and "
                "were undone: the layers stay whole; give larger ranks, or a later begin= in the schedule"
            )
            return (said,)
        for name, module in old.items():
            pair_now = parts.model.get_submodule(name)
            assert isinstance(pair_now, nn.Sequential)
            follow_(parts.optimizer, name, module, pair_now)
        self.done = rows
        return ()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Give a fresh model the pairs of a checkpoint; their weights are loaded by the caller."""
        parts = self.parts
        for name, row in state["rows"].items():
            old = parts.model.get_submodule(name)
            pair = restore_pair(parts.model, name, row)
            follow_(parts.optimizer, name, old, pair)

    def share(self) -> float:
        """Multiply-accumulates of linear layers and convolutions that are left, of those before."""
        layers = self.parts.layers
        left = float(layers.macs)
        for name, row in self.done.items():
            layer = layers.by_name[name]
            cost = _COSTS[row.form](layer.sizes, row.rank)
            left -= (layer.weights - cost.parameters) * layer.positions
        return left / layers.macs if layers.macs else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Numbers and texts that ``restore`` and ``load`` take."""
        return {
            "rows": {
                n: {"rank": r.rank, "form": r.form, "loss": r.loss} for n, r in self.done.items()
            },
            "reasons": dict(self.reasons),
            "difference": self.difference,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the model has its structure."""
        self.done = {
            n: Factored(layer=n, rank=int(r["rank"]), form=str(r["form"]), loss=float(r["loss"]))
            for n, r in state["rows"].items()
        }
        self.reasons, self.difference = dict(state["reasons"]), float(state["difference"])


def restore_pair(model: nn.Module, name: str, row: Mapping[str, Any]) -> nn.Sequential:
    """A pair of zeros in a layer's place, of a saved form and rank."""
    pair = blank_pair(model.get_submodule(name), as_form(str(row["form"])), int(row["rank"]))
    put_in_place(model, name, pair)
    return pair


def _shift_(module: nn.Module, pair: Fitted) -> Undo:
    """Add to the bias what the pair loses of the mean; the pair has the layer's own bias."""
    bias = module._parameters.get("bias")  # noqa: SLF001
    if bias is None or pair.shift is None:
        return lambda: None
    kept, gradient = bias.data.clone(), bias.grad
    bias.data = bias.data + pair.shift.to(bias.device, bias.dtype)

    def back() -> None:
        bias.data, bias.grad = kept, gradient

    return back


def _off(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Root mean square of the difference, of that of what was wanted; infinite where it is no number."""
    worst = 0.0
    for f, w in zip(found, wanted, strict=True):
        if not w.is_floating_point() or not w.numel():
            continue
        size = float(w.double().square().mean().sqrt())
        off = float((f.double() - w.double()).square().mean().sqrt())
        share = off / max(size, 1e-12)
        worst = max(worst, share) if math.isfinite(share) else math.inf
    return worst
