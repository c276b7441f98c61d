"""How far two outputs are apart, in the geometry of what the output means."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tersor.core.records import OutputKind

_TINY = 1e-30


def output_error(found: Sequence[Tensor], wanted: Sequence[Tensor], kind: OutputKind) -> Tensor:
    """Change of the output for each sample [n], 0 for no change.

    Logits: Kullback-Leibler divergence from the original's softmax over the last dimension, mean
    over positions. Else: squared error over the sample's mean squared deviation in the batch.
    Several float outputs add up; integer outputs do not count.
    """
    total: Tensor | None = None
    for new, old in zip(found, wanted, strict=True):
        if not old.is_floating_point() or old.dim() == 0:
            continue
        error = _kl(new, old) if kind == "logits" else _squared(new, old)
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


def _squared(new: Tensor, old: Tensor) -> Tensor:
    new, old = (t.double().reshape(len(old), -1) for t in (new, old))
    spread = old.square().mean() if len(old) < 2 else (old - old.mean(0)).square().mean()
    return (new - old).square().mean(1) / spread.clamp_min(_TINY)


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
