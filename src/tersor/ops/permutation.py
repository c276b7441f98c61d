"""An order of the inputs in which a pattern n of m keeps more.

Two large weights of an output that fall into one group of m compete. Permuting the inputs, which
folds into the layer before, brings them apart. The search deals the inputs out by their size, then
mends pairs of groups: of all ways to split the 2 m inputs of a pair, the one that keeps most is
taken. What is kept never falls, and the same seed gives the same order.

Axes: m outputs and n inputs, q pairs of groups, s ways to split a pair.
"""

from itertools import combinations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.ops.sparsity import NofM, check_splits

# Beyond 8 of 16 the ways to split a pair are too many to try.
MOST_INPUTS = 8
# Values looked at in one go: 32 MiB of float64.
CHUNK_VALUES = 2**22


def kept_score(scores: Float[Tensor, "m n"], pattern: NofM, order: Int64[Tensor, " n"]) -> float:
    """Sum of the scores that a pattern keeps of the inputs in this order."""
    parts = scores[:, order].to(torch.float64).unflatten(1, (-1, pattern.of))
    return float(parts.topk(pattern.kept, dim=2).values.sum())


def permute_inputs(
    scores: Float[Tensor, "m n"], pattern: NofM, *, rounds: int = 32, seed: int = 0
) -> Int64[Tensor, " n"]:
    """Order of the inputs in which the pattern keeps much of the scores.

    Args:
        scores: Score of every weight, >= 0, such as ``sparsity.obs_scores``; read only. Layers that
            read the same inputs are given together, outputs stacked.
        pattern: The pattern; at most ``MOST_INPUTS`` inputs a group.
        rounds: Random pairings of the groups, >= 0, each of which mends all pairs.
        seed: Of the pairings.

    Returns:
        Which input stands at each place: ``weight[:, order]`` is to be pruned. It keeps at least as
        much as the order in which the inputs came.

    Raises:
        ConfigError: Negative ``rounds``, or groups of too many inputs.
        ShapeError: Inputs that do not split into the groups of the pattern.

    Source: Pool and Yu 2021, Channel Permutations for N:M Sparsity, NeurIPS; here with exact splits of pairs.
    """
    inputs = scores.shape[1]
    check_splits(inputs, pattern)
    if rounds < 0:
        raise ConfigError(f"rounds must be >= 0, got {rounds}; 32 are enough for most layers")
    if pattern.of > MOST_INPUTS:
        raise ConfigError(f"groups of {pattern.of} inputs, wanted at most {MOST_INPUTS}")
    values = scores.to(torch.float64)
    plain = torch.arange(inputs, device=scores.device)
    dealt = _dealt(values, pattern)
    order = max((plain, dealt), key=lambda o: kept_score(values, pattern, o))
    if inputs < 2 * pattern.of or pattern.kept in (0, pattern.of):
        return plain
    generator = torch.Generator().manual_seed(seed)
    splits = _splits(pattern.of).to(scores.device)
    groups = order.reshape(-1, pattern.of).clone()
    for _ in range(rounds):
        pairing = torch.randperm(len(groups), generator=generator).to(scores.device)
        pairs = pairing[: len(pairing) // 2 * 2].reshape(-1, 2)
        groups[pairs] = _mended(values, groups[pairs], splits, pattern)
    return groups.flatten()


def _dealt(scores: Float[Tensor, "m n"], pattern: NofM) -> Int64[Tensor, " n"]:
    """Inputs from the largest on, one to each group, to and fro."""
    n_groups = scores.shape[1] // pattern.of
    ranked = scores.sum(0).argsort(descending=True, stable=True).reshape(pattern.of, n_groups)
    ranked[1::2] = ranked[1::2].flip(1)
    return ranked.mT.flatten()


def _splits(size: int) -> Int64[Tensor, "s both"]:
    """Ways to split 2 * size inputs into two groups, the first of them as they are."""
    every = range(2 * size)
    ways = []
    for rest in combinations(every[1:], size - 1):
        first = (0, *rest)
        ways.append([*first, *(i for i in every if i not in first)])
    return torch.tensor(ways)


def _mended(
    scores: Float[Tensor, "m n"],
    pairs: Int64[Tensor, "q two of"],
    splits: Int64[Tensor, "s both"],
    pattern: NofM,
) -> Int64[Tensor, "q two of"]:
    """The best split of every pair of groups."""
    flat = pairs.flatten(1)
    best, most = (
        flat.clone(),
        torch.full((len(flat),), -torch.inf, dtype=scores.dtype, device=flat.device),
    )
    chunk = max(1, CHUNK_VALUES // (max(1, scores.shape[0]) * flat.shape[1]))
    for start in range(0, len(flat), chunk):
        part = slice(start, start + chunk)
        values = scores[:, flat[part]].permute(2, 1, 0).contiguous()  # [2 of, q, m]
        for way in splits:
            halves = (values[way[: pattern.of]], values[way[pattern.of :]])
            kept = _kept_of(halves[0], pattern) + _kept_of(halves[1], pattern)
            # Rounding must not swap equals, or the order would depend on the machine.
            better = kept > most[part] * (1 + 1e-12)
            best[part] = torch.where(better.unsqueeze(1), flat[part][:, way], best[part])
            most[part] = torch.where(better, kept, most[part])
    return best.reshape(pairs.shape)


def _kept_of(values: Float[Tensor, "of q m"], pattern: NofM) -> Float[Tensor, " q"]:
    """What the pattern keeps of one group of inputs, summed over outputs."""
    if (pattern.kept, pattern.of) == (2, 4):  # a network of maxima is many times faster than topk
        high, low = torch.maximum(values[:2], values[2:]), torch.minimum(values[:2], values[2:])
        best = torch.maximum(high[0] + high[1], torch.maximum(*(high + low))).sum(1)
    else:
        best = values.topk(pattern.kept, dim=0).values.sum((0, 2))
    return best
