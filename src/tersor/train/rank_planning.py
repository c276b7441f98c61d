"""Which layers become pairs, and of which rank: prices of whole builds on the device that will serve the model.

Builds with pairs in them are measured when ``attach`` is called. A rank whose measured pair is not faster than its
layer is not taken, whatever it computes less. When stable ranks have settled, what each rank loses is worked out
on the weights as they are and on what the layers read, and the program of ``plan`` takes what loses the least
within the target.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tersor.api.proposing import Offers, propose
from tersor.api.session import Session
from tersor.core.errors import ConfigError
from tersor.core.rank_levels import format_of, rank_of
from tersor.core.records import Candidate, Level
from tersor.core.target import Target
from tersor.ops.rank_forms import Form, as_form
from tersor.train.factorable import Layer
from tersor.train.pricing import Measured, Pricing, Serving

Choice = tuple[int, Form | None]  # rank, and the form in which it was priced


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """A plan.

    Attributes:
        chosen: Layer -> rank and form; form None: the one that loses the least.
        reasons: Layer that stays whole -> why.
        predicted_ms: Latency of one call; None where ranks were given and not priced.
        note: What stands in the way of the target, where it can't be met.
    """

    chosen: Mapping[str, Choice]
    reasons: Mapping[str, str]
    predicted_ms: float | None = None
    note: str = ""


class RankPlanner:
    """Prices of pairs in one model on one device."""

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        layers: Mapping[str, Layer],
        target: Target,
        serving: Serving,
    ) -> None:
        """Build and measure, as ``Pricing`` does.

        Raises:
            ConfigError: No layer has a rank that is worth a price.
        """
        self.layers = layers
        self.pricing = Pricing(
            model, example, target, serving, ("lowrank", lambda session: _offers(session, layers))
        )
        self.slow = self._slow()

    @property
    def names(self) -> tuple[str, ...]:
        """The layers of which ranks are on offer."""
        offered = {c.site for c in self.pricing.offers.candidates if rank_of(c.level)}
        return tuple(n for n in self.layers if n in offered)

    def _slow(self) -> dict[tuple[str, Level], str]:
        """Ranks that are not faster than their layers, with both times; where bytes alone count, none."""
        pricing = self.pricing
        if pricing.target.speedup is None and pricing.target.latency_ms is None:
            return {}
        table, tensors = pricing.prices.tables[0], pricing.session.tensors
        whole = table.predict_ms({}, tensors)
        found: dict[tuple[str, Level], str] = {}
        for candidate in pricing.offers.candidates:
            ms = table.predict_ms({candidate.site: candidate.level}, tensors)
            if rank_of(candidate.level) and not ms < whole:
                found[candidate.site, candidate.level] = f"{ms:.3f} ms against {whole:.3f} ms"
        return found

    def ranks(self, loss: Callable[[str, Form, int], float]) -> Ranks:
        """The ranks that lose the least within the target.

        Args:
            loss: Of a layer, a form and a rank: what is lost of the layer's outputs.
        """
        pricing = self.pricing
        forms = {(c.site, c.level): _form(c) for c in pricing.offers.candidates}

        def error(candidate: Candidate) -> float:
            form, rank = _form(candidate), rank_of(candidate.level)
            if form is None:
                return 0.0
            if (candidate.site, candidate.level) in self.slow:
                return _NEVER
            return loss(candidate.site, form, rank)

        solutions = pricing.solved(error)
        fine = [(t, s) for t, s in solutions if s.is_feasible and s.totals.error < _NEVER]
        note = ""
        if fine:
            _, best = min(fine, key=lambda pair: pair[1].totals.error)
            assignment, predicted = dict(best.assignment), best.totals.ms
        else:
            table, solution = solutions[0]
            assignment = self._smallest()
            predicted = table.predict_ms(assignment, pricing.session.tensors)
            missed = "only with pairs that are slower than their layers"
            note = (
                f"the target {pricing.target.describe()} can't be met by pairs alone: "
                f"{missed if solution.is_feasible else pricing.missed(solution)}"
            )
        chosen = {
            site: (rank_of(level), forms[site, level])
            for site, level in assignment.items()
            if rank_of(level)
        }
        reasons = {n: self._why_whole(n) for n in self.layers if n not in chosen}
        return Ranks(chosen=chosen, reasons=reasons, predicted_ms=predicted, note=note)

    def _smallest(self) -> dict[str, Level]:
        """The fastest of the ranks that are faster, of each layer; those that have none stay out."""
        pricing = self.pricing
        table, tensors = pricing.prices.tables[0], pricing.session.tensors
        found: dict[str, Level] = {}
        for site, row in pricing.offers.by_site().items():
            fine = [c.level for c in row if rank_of(c.level) and (site, c.level) not in self.slow]
            if fine:
                found[site] = min(fine, key=lambda level: table.predict_ms({site: level}, tensors))
        return found

    def _why_whole(self, layer: str) -> str:
        row = [c for c in self.pricing.offers.by_site().get(layer, ()) if rank_of(c.level)]
        if not row:
            return "no rank of it is worth a price"
        slow = [self.slow.get((layer, c.level)) for c in row]
        if all(slow):
            return f"no measured pair is faster: {slow[-1]}"
        return "the plan keeps it whole"

    def measure(self, small: nn.Module) -> Measured:
        """The small model's build beside the best uncompressed build, in one run."""
        return self.pricing.measure(small)


_NEVER = 1e6  # more than all layers together can lose


def _form(candidate: Candidate) -> Form | None:
    """Of a candidate with a rank."""
    return as_form(str(candidate.detail["form"])) if rank_of(candidate.level) else None


def _offers(session: Session, layers: Mapping[str, Layer]) -> Offers:
    """Layers as they are, and pairs in floats: what a module that trains can be."""
    found = propose(session)
    kept = tuple(
        c
        for c in found.candidates
        if not rank_of(c.level) or (c.site in layers and format_of(str(c.level)) == "f32")
    )
    if not any(rank_of(c.level) for c in kept):
        raise ConfigError(
            "target: found no layer with a rank that is worth a price (ranks of 8 and more, below break-even); "
            "say ranks by counts={layer: rank}, or shrink widths with another algorithm"
        )
    changes = {(c.site, c.level): found.changes[c.site, c.level] for c in kept}
    return Offers(candidates=kept, changes=changes, inside=found.inside)
