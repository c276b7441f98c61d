"""Streaming pieces of one statistics pass: histograms, row samples, moments."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tersor.ops.moments import Moments, add_moments, moments_of

BINS = 2048


@dataclass
class Histogram:
    """Counts over [-edge, edge], the edge a power of two that grows with the data.

    Growing merges pairs of bins, so one pass is enough and nothing is counted twice.
    """

    edge: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))
    low: float = float("inf")
    high: float = float("-inf")

    def add_(self, values: Tensor) -> None:
        """Count values of any shape."""
        flat = values.detach().float().reshape(-1)
        if not flat.numel():
            return
        low, high = (float(v) for v in torch.aminmax(flat))
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._cover_(max(abs(low), abs(high)))
        if self.edge:
            self.counts += torch.histc(flat, BINS, -self.edge, self.edge).double()
        else:  # nothing but zeros so far: this bin is theirs for every edge
            self.counts[BINS // 2] += flat.numel()

    def _cover_(self, amax: float) -> None:
        if amax == 0.0 or amax <= self.edge:
            return
        wanted = 2.0 ** torch.ceil(torch.log2(torch.tensor(amax, dtype=torch.float64))).item()
        while wanted < amax:
            wanted *= 2
        while self.edge and self.edge < wanted:
            half = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : BINS // 4 + BINS // 2] = half
            self.edge *= 2
        self.edge = max(self.edge, wanted)

    def edges(self) -> Tensor:
        """Borders of the bins [BINS + 1]."""
        return torch.linspace(-self.edge, self.edge, BINS + 1, dtype=torch.float64)


@dataclass
class RowSample:
    """At most ``limit`` rows of a stream of batches, spread evenly over the batches."""

    limit: int
    batches: int  # expected number of batches
    rows: list[Tensor] = field(default_factory=list)

    def pick(self, count: int, generator: torch.Generator) -> Tensor:
        """Indices of the rows to keep of the next ``count`` rows."""
        share = max(1, -(-self.limit // max(1, self.batches)))
        room = self.limit - sum(len(r) for r in self.rows)
        share = max(0, min(share, room, count))
        return torch.randperm(count, generator=generator)[:share].sort().values

    def add_(self, rows: Tensor) -> None:
        """Keep rows; of none, their width."""
        if len(rows) or not self.rows:
            self.rows.append(rows.detach().clone())

    def value(self) -> Tensor:
        """All rows kept."""
        return torch.cat(self.rows)


@dataclass
class MomentStream:
    """Sums of products over a stream of rows."""

    total: Moments | None = None

    def add_(
        self,
        rows: Tensor,
        original: Tensor | None = None,
        residual: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Add rows [t, g, n], each with its weight."""
        part = moments_of(rows, original, residual, weights)
        self.total = part if self.total is None else add_moments(self.total, part)

    def value(self) -> Moments:
        """The sums so far."""
        assert self.total is not None, "no rows were added"
        return self.total
