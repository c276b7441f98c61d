"""Narrower heads fold into the projections; exact at full rank, exact steps, errors by definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tersor.core.errors import ConfigError, ShapeError
from tersor.ops.heads import (
    ValueReduction,
    _refit_maps,
    fold_head,
    output_moments,
    reduce_values,
    score_curve,
)
from tersor.ops.moments import moments_of
from tersor.ops.objective import Objective, objective_of

SEEDS = st.integers(0, 2**32 - 1)
HEADS, SIZE, WIDTH = 4, 3, 8  # of the small attention below


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Attention:
    """Plain attention over sequences x [b, t, WIDTH], with fewer key and value heads if they are shared."""

    def __init__(self, seed: int, sharing: int = 1) -> None:
        kv = HEADS // sharing * SIZE
        self.sharing = sharing
        self.q = normal(seed, HEADS * SIZE, WIDTH), normal(seed + 1, HEADS * SIZE)
        self.k = normal(seed + 2, kv, WIDTH), normal(seed + 3, kv)
        self.v = normal(seed + 4, kv, WIDTH), normal(seed + 5, kv)
        self.o = normal(seed + 6, 7, HEADS * SIZE), normal(seed + 7, 7)

    def heads(self, x: Tensor, which: tuple[Tensor, Tensor], count: int) -> Tensor:
        y = x @ which[0].T + which[1]
        return y.reshape(*x.shape[:2], count, -1).transpose(1, 2)  # [b, head, t, d]

    def scores(self, x: Tensor) -> Tensor:
        kv = HEADS // self.sharing
        keys = self.heads(x, self.k, kv).repeat_interleave(self.sharing, 1)
        return self.heads(x, self.q, HEADS) @ keys.mT / SIZE**0.5

    def handed(self, x: Tensor) -> Tensor:
        """What the output projection reads."""
        kv = HEADS // self.sharing
        values = self.heads(x, self.v, kv).repeat_interleave(self.sharing, 1)
        return (self.scores(x).softmax(-1) @ values).transpose(1, 2).flatten(2)

    def __call__(self, x: Tensor) -> Tensor:
        return self.handed(x) @ self.o[0].T + self.o[1]


def inputs(seed: int) -> Tensor:
    return normal(seed, 10, 6, WIDTH) @ normal(seed + 1, WIDTH, WIDTH) / 3 + normal(seed + 2, WIDTH)


def objective_at(attention: Attention, x: Tensor, damping: float = 1e-4) -> Objective:
    z = attention.handed(x).flatten(0, 1).unsqueeze(1)
    return objective_of(attention.o[0].unsqueeze(0), moments_of(z), damping)


def reduced(attention: Attention, found: ValueReduction) -> Attention:
    new = Attention(0, attention.sharing)
    new.q, new.k = attention.q, attention.k
    weight, bias = fold_head(found.maps, *attention.v)
    assert bias is not None
    new.v = weight, bias
    new.o = found.weight, attention.o[1] + found.bias
    return new


@pytest.mark.parametrize("sharing", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_error_is_that_of_the_narrower_attention(sharing: int, rank: int) -> None:
    attention, x = Attention(3, sharing), inputs(5)
    objective = objective_at(attention, x)
    found = reduce_values(objective, HEADS, rank, sharing=sharing)
    assert found.maps.shape == (HEADS // sharing, rank, SIZE)
    assert found.weight.shape == (7, HEADS * rank)
    change = (reduced(attention, found)(x) - attention(x)).flatten(0, 1)
    wanted = float(change.square().mean(0).sum())
    assert found.error == pytest.approx(wanted, rel=1e-7, abs=1e-12)
    assert bool((change.mean(0).abs() <= 1e-10).all())
    for before, after in zip(found.losses, found.losses[1:], strict=False):
        assert after <= before * (1 + 1e-9) + 1e-12
    if rank == SIZE:
        assert found.error <= 1e-16 * float(objective.variance)


@given(SEEDS, st.sampled_from([1, 2]))
@settings(max_examples=10, deadline=None)
def test_no_step_leaves_a_gradient(seed: int, sharing: int) -> None:
    objective = objective_at(Attention(seed, sharing), inputs(seed), 1e-3)
    metric, target = objective.damped()[0], objective.weight[0]
    found = reduce_values(objective, HEADS, 2, sharing=sharing, sweeps=1)

    def gradients(weight: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        W, E = weight.clone().requires_grad_(), maps.clone().requires_grad_()
        whole = torch.block_diag(*[E[h // sharing] for h in range(HEADS)])
        D = target - W @ whole
        ((D @ metric) * D).sum().backward()
        assert W.grad is not None
        assert E.grad is not None
        return W.grad, E.grad

    size = float(((target @ metric) * target).sum())
    of_weight, _ = gradients(found.weight, found.maps)
    assert float(of_weight.abs().max()) <= 1e-8 * size
    maps, _ = _refit_maps(target, metric, found.weight, found.maps, sharing)
    _, of_maps = gradients(found.weight, maps)
    assert float(of_maps[-1].abs().max()) <= 1e-8 * size  # the head that was solved last


def test_one_head_is_the_closed_form_of_low_rank() -> None:
    z = normal(1, 90, 1, 6) @ normal(2, 6, 6)
    objective = objective_of(normal(0, 1, 5, 6), moments_of(z), 0.0)
    found = reduce_values(objective, 1, 2, sweeps=0)
    L = torch.linalg.cholesky(objective.H[0])
    S = torch.linalg.svdvals(objective.weight[0] @ L)
    assert found.error == pytest.approx(float(S[2:].square().sum()), rel=1e-9)


def test_joint_fits_beat_heads_by_themselves() -> None:
    """Heads that say the same can share the work; a head by itself does not know."""
    alone, start, end = 0.0, 0.0, 0.0
    for seed in range(8):
        z = normal(seed, 200, 1, 8) @ normal(seed + 1, 8, 8)
        objective = objective_of(normal(seed + 3, 1, 5, 8), moments_of(z))
        own = []
        for columns in (slice(0, 4), slice(4, 8)):
            part = objective_of(objective.weight[:, :, columns], moments_of(z[:, :, columns]))
            found = reduce_values(part, 1, 2, sweeps=0)
            own.append(found.weight @ found.maps[0])
        alone += float(objective.error(torch.cat(own, 1).unsqueeze(0)))
        start += reduce_values(objective, 2, 2, sweeps=0).error
        end += reduce_values(objective, 2, 2, sweeps=3).error
    assert start < 0.8 * alone
    assert end < 0.8 * start


def test_degenerate_values() -> None:
    z = normal(1, 3, 1, 6)  # fewer rows than inputs
    z[:, :, 0], z[:, :, 4] = 0, 2
    for outputs in (1, 4):
        W = normal(0, 1, outputs, 6)
        W[:, :, 5] = 0
        found = reduce_values(objective_of(W, moments_of(z)), 2, 2)
        assert bool(found.weight.isfinite().all())
        assert bool(found.maps.isfinite().all())
        assert found.error <= 1e-2 * float(objective_of(W, moments_of(z)).variance)


def moments_for_scores(attention: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.flatten(0, 1)
    mean = rows.mean(0)
    H = (rows - mean).T @ (rows - mean) / len(rows)
    kv = HEADS // attention.sharing
    Hq, _ = output_moments(*attention.q, H, mean, HEADS)
    _, Hk = output_moments(*attention.k, H, mean, kv)
    return Hq.reshape(kv, attention.sharing, SIZE, SIZE).sum(1), Hk


@pytest.mark.parametrize("sharing", [1, 2])
def test_score_errors_are_those_of_all_pairs_of_rows(sharing: int) -> None:
    attention, x = Attention(8, sharing), inputs(9)
    Hq, Hk = moments_for_scores(attention, x)
    curve = score_curve(Hq, Hk, damping=0.0)
    queries = attention.heads(x, attention.q, HEADS).transpose(0, 1).flatten(1, 2)
    keys = attention.heads(x, attention.k, HEADS // sharing).transpose(0, 1).flatten(1, 2)
    keys = keys - keys.mean(1, keepdim=True)
    for rank in range(SIZE + 1):
        for head in range(HEADS // sharing):
            lost = 0.0
            for q in queries[head * sharing : (head + 1) * sharing]:
                exact = q @ keys[head].T
                mapped = (q @ curve.queries[head, :rank].T) @ (
                    keys[head] @ curve.keys[head, :rank].T
                ).T
                lost += float((exact - mapped).square().mean())
            assert lost == pytest.approx(float(curve.errors[head, rank]), rel=1e-6, abs=1e-9)
    assert bool((curve.errors.diff(dim=1) <= 0).all())


def test_no_other_maps_of_queries_and_keys_are_better() -> None:
    A, B = normal(0, 1, 4, 9), normal(1, 1, 4, 9)
    Hq, Hk = A @ A.mT, B @ B.mT
    curve = score_curve(Hq, Hk, damping=0.0)
    F, E = (m[0, :2].clone().requires_grad_() for m in (curve.queries, curve.keys))

    def loss(F: Tensor, E: Tensor) -> Tensor:
        D = torch.eye(4, dtype=torch.float64) - F.T @ E
        return torch.trace(Hq[0] @ D @ Hk[0] @ D.T)

    value = loss(F, E)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(curve.errors[0, 2]), rel=1e-9)
    assert F.grad is not None
    assert E.grad is not None
    assert float(max(F.grad.abs().max(), E.grad.abs().max())) <= 1e-9 * float(
        Hq.abs().max() * Hk.abs().max()
    )
    for seed in range(20):
        f, e = F.detach() + 0.1 * normal(seed, 2, 4), E.detach() + 0.1 * normal(seed + 40, 2, 4)
        assert float(loss(f, e)) >= float(value.detach())
    # Balanced: both sides of the product have one size.
    sizes = [
        torch.einsum("rd,de,re->r", m[0], H[0], m[0])
        for m, H in ((curve.queries, Hq), (curve.keys, Hk))
    ]
    assert torch.allclose(sizes[0], sizes[1], rtol=1e-8)


@pytest.mark.parametrize("sharing", [1, 2])
def test_full_rank_leaves_attention_as_it_is(sharing: int) -> None:
    """Softmax forgets the keys' mean, so that centring costs nothing."""
    attention, x = Attention(2, sharing), inputs(4)
    curve = score_curve(*moments_for_scores(attention, x))
    new = Attention(2, sharing)
    q_weight, q_bias = fold_head(curve.queries.repeat_interleave(sharing, 0), *attention.q)
    k_weight, k_bias = fold_head(curve.keys, *attention.k)
    assert q_bias is not None
    assert k_bias is not None
    new.q, new.k = (q_weight, q_bias), (k_weight, k_bias)
    assert torch.allclose(new(x), attention(x), atol=1e-9)
    moved = Attention(2, sharing)
    moved.k = attention.k[0], attention.k[1] + 5 * normal(1, len(attention.k[1]))
    assert torch.allclose(moved(x), attention(x), atol=1e-9)


def test_degenerate_scores() -> None:
    flat = torch.zeros(1, 3, 3, dtype=torch.float64)
    one = flat.clone()
    one[0, 0, 0] = 4
    for Hq, Hk in ((flat, one), (one, flat), (one, one)):
        curve = score_curve(Hq, Hk)
        assert bool(curve.queries.isfinite().all() & curve.keys.isfinite().all())
        assert float(curve.errors[0, 1]) <= 1e-9
    assert score_curve(one, one, damping=0.0).damping > 0


def test_a_projection_without_bias_stays_without() -> None:
    folded, bias = fold_head(normal(0, 2, 1, 3), normal(1, 6, 4), None)
    assert folded.shape == (2, 4)
    assert bias is None


def test_messages() -> None:
    objective = objective_of(normal(0, 1, 5, 6), moments_of(normal(1, 20, 1, 6)))
    with pytest.raises(ConfigError, match=r"head of output projection.*rank 4, wanted 0\.\.3"):
        reduce_values(objective, 2, 4)
    with pytest.raises(ConfigError, match="wanted a rank of 1 or more and sweeps >= 0"):
        reduce_values(objective, 2, 0)
    with pytest.raises(ShapeError, match="split into 4 query heads"):
        reduce_values(objective, 4, 1)
    with pytest.raises(ShapeError, match="sets of 2"):
        reduce_values(objective, 3, 1, sharing=2)
    with pytest.raises(ShapeError, match=r"queries \(2, 3, 3\) and keys \(1, 3, 3\)"):
        score_curve(torch.zeros(2, 3, 3), torch.zeros(1, 3, 3))
    with pytest.raises(ShapeError, match="wanted 2 heads of 3 rows"):
        fold_head(normal(0, 2, 1, 3), normal(1, 5, 4), None)
    with pytest.raises(ShapeError, match="5 outputs does not split into 2 heads"):
        output_moments(normal(0, 5, 4), torch.zeros(5), torch.eye(4), torch.zeros(4), 2)
