"""How many samples an error needs: more are read until each error is known well enough.

All candidates read the same samples in the same order, and are looked at after 16, 32, 64 ... of
them. One that is known well enough reads no more, so that its samples are the first of everyone
else's: errors stay paired.

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
    places = (torch.arange(1, count + 1, dtype=torch.float64) * _GOLDEN) % 1.0
    return places.argsort().argsort()


def rounds(
    batches: Sequence[Flat], precision: Precision, chunk: int
) -> Iterator[tuple[list[Flat], bool]]:
    """Flat inputs of the samples between one look and the next, and whether they are the last.

    Args:
        batches: Flat inputs of all samples; those of one shape are put together.
        precision: Says where the looks are.
        chunk: Samples in a batch at most.
    """
    groups = by_shape(batches)
    counts = [len(flat[0]) for flat in groups]
    order = spread_order(sum(counts))
    looks = precision.looks(len(order))
    for start, stop in zip((0, *looks), looks, strict=False):
        found: list[Flat] = []
        offset = 0
        taken = order[start:stop]
        for flat, count in zip(groups, counts, strict=True):
            rows = taken[(taken >= offset) & (taken < offset + count)] - offset
            found += [tuple(t[r] for t in flat) for r in rows.split(chunk) if len(r)]
            offset += count
        yield found, stop == looks[-1]


def by_shape(batches: Sequence[Flat]) -> list[Flat]:
    """Batches of one shape a sample put together, in the order in which shapes come first."""
    groups: dict[tuple[torch.Size, ...], list[Flat]] = {}
    for flat in batches:
        groups.setdefault(tuple(t.shape[1:] for t in flat), []).append(flat)
    return [
        rows[0] if len(rows) == 1 else tuple(map(torch.cat, zip(*rows, strict=True)))
        for rows in groups.values()
    ]
