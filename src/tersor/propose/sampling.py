"""How many samples an error needs: more are read until each error is known well enough.

All candidates read the same samples in the same order, and are looked at after 16, 32, 64 ... of
them. One that is known well enough reads no more, so that its samples are the first of everyone
else's: errors stay paired.

A classifier is sure of most samples, and nothing that is done to it shows there; a few unsure ones
make up the mean. They are drawn more often, and count for less.

A mean that may stop when its standard error looks small is a little too low for errors with a long
tail, as samples without the tail stop it early. Few looks, doubling, keep that small: for
log-normal errors whose deviation is 1.3 times their mean, what is reported is 1.4 % low on average.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tersor.core.errors import ConfigError

Flat = tuple[Tensor, ...]
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """When an error is known well enough.

    Args:
        relative: Its standard error is at most this share of it, or
        share: at most this share of what a plan that changes every site loses, roughly; or of
        floor: the error at which a plan begins to lose anything: a relative squared error of 0.01
            is a cosine of 0.995, and a divergence of 0.01 turns few answers.
        least: Samples that every candidate reads, where there are as many; at least 2.
        most: Samples that none goes beyond.

    Raises:
        ConfigError: A share that is not positive, or numbers that do not fit.
    """

    relative: float = 0.1
    share: float = 1e-3
    floor: float = 1e-2
    least: int = 16
    most: int = 256

    def __post_init__(self) -> None:
        if not (self.relative > 0 and self.share >= 0 and self.floor >= 0):
            raise ConfigError(
                f"precision: found relative={self.relative}, share={self.share} and "
                f"floor={self.floor}, wanted a positive number and two that are not negative"
            )
        if not 2 <= self.least <= self.most:
            raise ConfigError(
                f"precision: found {self.least} to {self.most} samples, wanted at least 2, and no "
                "more of the first than of the second"
            )

    def looks(self, available: int) -> tuple[int, ...]:
        """After how many samples errors are looked at; the last is as many as there may be."""
        last = min(self.most, available)
        found = [self.least]
        while found[-1] < last:
            found.append(2 * found[-1])
        return (*found[:-1], last)

    def is_enough(self, errors: Tensor, scale: float, useless: float) -> bool:
        """Whether the mean of some errors needs no more samples.

        Args:
            errors: One a sample [t].
            scale: What a plan that changes every site loses, roughly.
            useless: The error of an answer that does not look at the input. What is surely as bad
                has no place in any plan with a quality to keep, however bad it is.
        """
        mean, deviation = mean_error(errors)
        if not math.isfinite(mean):  # and no sample will mend it
            return True
        allowed = max(self.relative * mean, self.share * max(scale, self.floor))
        return deviation <= allowed or mean - 2 * deviation >= useless


def mean_error(errors: Tensor) -> tuple[float, float]:
    """The mean of errors [t], and its standard error: 0 where one sample tells nothing of it."""
    deviation = float(errors.std()) if len(errors) > 1 else 0.0
    return float(errors.mean()), deviation / max(1, len(errors)) ** 0.5


def plan_scale(means: Mapping[int, float], sites: Mapping[int, str]) -> float:
    """What a plan that changes every site loses, roughly: a middle level at a middle site, times sites.

    Medians, as a layer that can't take a change would make all others look negligible.

    Args:
        means: Candidate -> its mean error, of those that change anything.
        sites: Candidate -> its site.
    """
    by_site: dict[str, list[float]] = {}
    for i, mean in means.items():
        by_site.setdefault(sites[i], []).append(mean)
    middles = [float(torch.tensor(row).nanmedian()) for row in by_site.values()]
    return len(middles) * float(torch.tensor(middles).nanmedian()) if middles else 0.0


def spread_order(count: int) -> Tensor:
    """All indices below ``count`` in an order whose every beginning is spread evenly over them.

    Samples may come sorted, by class or by length; their first ones are then like none of the rest.

    Source: the golden-ratio sequence; Niederreiter 1992, section 3.1.
    """
    return _places(count).argsort().argsort()


@dataclass(frozen=True, slots=True)
class Look:
    """What is known at one look.

    Attributes:
        fresh: Samples that are read for it, and were not before.
        draws: All samples drawn so far, in order; one may be drawn again.
        weights: What an error counts for, one a draw: the mean of errors times weights is the mean
            error of all samples, on average over the draws.
    """

    fresh: Tensor
    draws: Tensor
    weights: Tensor


def draw(sensitivity: Tensor, precision: Precision) -> tuple[Look, ...]:
    """Which samples are read by when, those more often on which a change of the model shows more.

    A sample's probability is half even and half by its sensitivity, so that no error counts for
    more than twice itself. Where all are equally sensitive, none is drawn twice; a look at as many
    draws as there are samples is a look at all of them.

    Args:
        sensitivity: About how an error depends on the sample, >= 0 [t].
        precision: Says where the looks are.

    Source: Hansen and Hurwitz 1943; defensive mixture: Hesterberg 1995, Technometrics 37.
    """
    count = len(sensitivity)
    looks = precision.looks(count)
    everyone = spread_order(count)
    order, weights = everyone, torch.ones(count, dtype=torch.float64)
    total = float(sensitivity.sum())
    if total > 0 and float(sensitivity.max() - sensitivity.min()) > 0:
        p = 0.5 / count + 0.5 * sensitivity.double() / total
        order = torch.searchsorted(p.cumsum(0), _places(looks[-1])).clamp_max(count - 1)
        weights = 1 / (count * p)
    seen = torch.zeros(count, dtype=torch.bool)
    found = []
    for stop in looks:
        is_all = stop == count
        draws = everyone if is_all else order[:stop]
        fresh = draws[~seen[draws]].unique()
        seen[fresh] = True
        used = torch.ones(count, dtype=torch.float64) if is_all else weights[draws]
        found.append(Look(fresh, draws, used))
    return tuple(found)


def _places(count: int) -> Tensor:
    return (torch.arange(1, count + 1, dtype=torch.float64) * _GOLDEN) % 1.0


def gathered(batches: Sequence[Flat], index: Tensor, chunk: int) -> Iterator[tuple[Flat, Tensor]]:
    """Flat inputs of some samples, in chunks of one shape, with their indices.

    Args:
        batches: Flat inputs of all samples, one entry a shape (``by_shape``), numbered through.
        index: Samples that are wanted.
        chunk: Samples in a batch at most.
    """
    start = 0
    for flat in batches:
        stop = start + len(flat[0])
        for rows in index[(index >= start) & (index < stop)].split(chunk):
            if len(rows):
                yield tuple(t[rows - start] for t in flat), rows
        start = stop


def by_shape(batches: Sequence[Flat]) -> list[Flat]:
    """Batches of one shape a sample put together, in the order in which shapes come first."""
    groups: dict[tuple[torch.Size, ...], list[Flat]] = {}
    for flat in batches:
        groups.setdefault(tuple(t.shape[1:] for t in flat), []).append(flat)
    return [
        rows[0] if len(rows) == 1 else tuple(map(torch.cat, zip(*rows, strict=True)))
        for rows in groups.values()
    ]
