"""How far two outputs are apart, in the geometry of what the output means."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.core.records import OutputKind

_TINY = 1e-30


def output_error(
    found: Sequence[Tensor],
    wanted: Sequence[Tensor],
    kind: OutputKind,
    spreads: Sequence[float] | None = None,
) -> Tensor:
    """Change of the output for each sample [n], 0 for no change.

    Logits: Kullback-Leibler divergence from the original's softmax over the last dimension, mean
    over positions. Else: squared error over the sample's mean squared deviation in the batch.
    Several float outputs add up; integer outputs do not count.

    Args:
        found: New outputs.
        wanted: The original's.
        kind: What they mean.
        spreads: What squared errors are divided by, one an output (``output_spreads``), so that a
            sample's error does not depend on those beside it. None: the batch's own.
    """
    total: Tensor | None = None
    for position, (new, old) in enumerate(zip(found, wanted, strict=True)):
        if not old.is_floating_point() or old.dim() == 0:
            continue
        spread = None if spreads is None else spreads[position]
        error = _kl(new, old) if kind == "logits" else _squared(new, old, spread)
        total = error if total is None else total + error
    if total is None:
        return torch.zeros(1, dtype=torch.float64)
    return total


def _kl(new: Tensor, old: Tensor) -> Tensor:
    log_p = torch.log_softmax(_classes_last(old.double()), -1)
    log_q = torch.log_softmax(_classes_last(new.double()), -1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return divergence.reshape(len(old), -1).mean(1)


def _classes_last(logits: Tensor) -> Tensor:
    """Dense predictions [n, classes, height, width] hold their classes in dimension 1."""
    return logits.movedim(1, -1) if logits.dim() >= 4 else logits


def _squared(new: Tensor, old: Tensor, spread: float | None = None) -> Tensor:
    new, old = (t.double().reshape(len(old), -1) for t in (new, old))
    if spread is None:
        own = old.square().mean() if len(old) < 2 else (old - old.mean(0)).square().mean()
        spread = float(own)
    return (new - old).square().mean(1) / max(spread, _TINY)


def output_spreads(batches: Sequence[Sequence[Tensor]]) -> tuple[float, ...]:
    """Mean squared deviation of each output from its mean over samples, unbiased.

    Args:
        batches: Outputs of some batches. Samples of one shape share a mean; a shape that a single
            sample has tells nothing, and where all are such, it is the mean square.
    """
    return tuple(_spread(column) for column in zip(*batches, strict=True))


def _spread(outputs: Sequence[Tensor]) -> float:
    rows = [t.double().reshape(len(t), -1) for t in outputs if t.dim()]
    shapes: dict[int, list[Tensor]] = {}
    for values in rows:
        shapes.setdefault(values.shape[1], []).append(values)
    total = weight = 0.0
    for alike in map(torch.cat, shapes.values()):
        if len(alike) > 1:
            total += float(alike.var(0).mean()) * len(alike)
            weight += len(alike)
    if not weight:
        total = sum(float(t.square().mean(1).sum()) for t in rows)
        weight = sum(map(len, rows))
    return total / max(weight, 1.0)


def constant_error(batches: Sequence[Sequence[Tensor]], kind: OutputKind) -> float:
    """Error of the best answer that does not look at the input: what is worse says nothing.

    Squared errors: 1 an output. Logits: divergence from the mean softmax over the samples, dense
    predictions over all positions.

    Args:
        batches: Outputs of the original on some batches.
        kind: What they mean.
    """
    total = 0.0
    for column in zip(*batches, strict=True):
        if not column[0].is_floating_point() or column[0].dim() == 0:
            continue
        if kind != "logits":
            total += 1.0
            continue
        total += _entropy_of_the_mean(column)
    return total


def sample_sensitivity(outputs: Sequence[Tensor], kind: OutputKind, count: int) -> Tensor:
    """How much a change of the outputs counts on each sample [count], up to a common factor.

    Logits: 1 - sum p^2, mean over positions: twice the divergence for logits that all move by
    themselves, to second order. Squared errors count the same on all samples.

    Args:
        outputs: Of the original.
        kind: What they mean.
        count: Samples in the batch.
    """
    total = torch.zeros(count, dtype=torch.float64)
    if kind != "logits":
        return total + 1.0
    for logits in outputs:
        if logits.is_floating_point() and logits.dim() > 1:
            p = _classes_last(logits.double()).softmax(-1)
            total += (1.0 - p.square().sum(-1)).reshape(count, -1).mean(1)
    return total


def _entropy_of_the_mean(column: Sequence[Tensor]) -> float:
    """H(mean p) - mean H(p): the mean divergence of each answer from the mean answer."""
    mean, entropy, count = torch.zeros((), dtype=torch.float64), 0.0, 0
    for logits in column:
        rows = _classes_last(logits.double())
        p = rows.reshape(-1, rows.shape[-1]).softmax(-1)
        mean = mean + p.sum(0)
        entropy += float(torch.special.entr(p).sum())
        count += len(p)
    return float(torch.special.entr(mean / count).sum()) - entropy / count


def sample_agreement(found: Sequence[Tensor], wanted: Sequence[Tensor], kind: OutputKind) -> Tensor:
    """Agreement of each sample with the original [n], 1 for equal.

    Logits: share of equal top-1. Embedding: cosine. Values: 1 - normalised squared error.
    """
    scores: list[Tensor] = []
    for new, old in zip(found, wanted, strict=True):
        if not old.is_floating_point() or old.dim() == 0:
            continue
        if kind == "logits":
            equal = _classes_last(new).argmax(-1) == _classes_last(old).argmax(-1)
            scores.append(equal.double().reshape(len(old), -1).mean(1))
        elif kind == "embedding":
            left, right = (t.double().reshape(len(old), -1) for t in (new, old))
            scores.append(torch.nn.functional.cosine_similarity(left, right, dim=1))
        else:
            scores.append(1.0 - _squared(new, old))
    if not scores:
        return torch.ones(1, dtype=torch.float64)
    return torch.stack(scores).mean(0)
