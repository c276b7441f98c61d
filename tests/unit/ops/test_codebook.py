"""Feedback by definition, entries without gradient, codes that no single change betters, losses that fall."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tersor.core.errors import ConfigError, NumericalError, ShapeError
from tersor.ops.codebook import Codebook, CodebookScheme, decode, first_tables, nearest_codes
from tersor.ops.codebook_fit import descend_codes, fit_codebook, refit_entries
from tersor.ops.kmeans import optimal_codebooks
from tersor.ops.moments import moments_of
from tersor.ops.objective import objective_of

SEEDS = st.integers(0, 2**32 - 1)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"),
        ],
    ),
]
# Outputs and inputs that share a table, for weights [2, 4, 6].
SHARES = [(0, 0), (1, 0), (2, 3), (8, 2), (4, 1), (0, 3)]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(
    seed: int, *, groups: int = 2, outputs: int = 4, inputs: int = 6, n_rows: int = 40
) -> tuple[Tensor, Tensor]:
    """Weight and the second moment of correlated inputs of unequal size."""
    mixing = normal(seed + 1, groups, inputs, inputs) / inputs**0.5 + torch.eye(inputs)
    x = normal(seed + 2, groups, n_rows, inputs) @ mixing * (0.5 + torch.arange(inputs) / inputs)
    return normal(seed, groups, outputs, inputs), x.mT @ x / n_rows


def scheme(share: tuple[int, int], entries: int = 3) -> CodebookScheme:
    return CodebookScheme(
        entries=entries, outputs=share[0], inputs=share[1], value_dtype=torch.float64
    )


def table_of(tables: Tensor, group: int, row: int, column: int, shape: torch.Size) -> Tensor:
    """By definition: blocks of neighbouring outputs over all groups, and of neighbouring inputs."""
    b, c, _ = tables.shape
    place = group * shape[1] + row
    return tables[place * b // (shape[0] * shape[1]), column * c // shape[2]]


def loss_of(W: Tensor, H: Tensor, Q: Tensor) -> Tensor:
    D = W - Q
    return torch.einsum("gmi,gij,gmj->g", D, H, D)


def damped(H: Tensor, damping: float) -> Tensor:
    ridge = damping * H.diagonal(dim1=1, dim2=2).mean(1)
    return H + ridge[:, None, None] * torch.eye(H.shape[1], dtype=H.dtype)


@pytest.mark.parametrize("share", SHARES)
def test_first_tables_and_nearest_codes_by_definition(share: tuple[int, int]) -> None:
    W, H = problem(1)
    importance = H.diagonal(dim1=1, dim2=2)
    tables, merged = first_tables(W, importance, scheme(share))
    codes = nearest_codes(W, tables)
    assert merged == 0
    assert tables.shape == (8 // (share[0] or 8), 6 // (share[1] or 6), 3)
    book = decode(Codebook(codes=codes, tables=tables))
    members: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for g in range(2):
        for i in range(4):
            for j in range(6):
                table = table_of(tables, g, i, j, W.shape)
                away = (table - W[g, i, j]).abs()
                assert float(book[g, i, j]) == float(table[int(codes[g, i, j])])
                assert float((book[g, i, j] - W[g, i, j]).abs()) == float(away.min())
                key = ((g * 4 + i) // (share[0] or 8), j // (share[1] or 6))
                members.setdefault(key, []).append((float(W[g, i, j]), float(importance[g, j])))
    for (a, b), pairs in members.items():
        values, weights = torch.tensor(pairs, dtype=torch.float64).T.unsqueeze(1)
        assert torch.allclose(tables[a, b], optimal_codebooks(values, weights, 3).tables[0])


def brain_quantization(W: Tensor, H: Tensor, tables: Tensor, order: list[int]) -> Tensor:
    """OBQ in a fixed order by downdates of the inverse, one row at a time."""
    codes = torch.zeros(W.shape, dtype=torch.uint8)
    for g in range(W.shape[0]):
        for i in range(W.shape[1]):
            w, inverse = W[g, i].clone(), torch.linalg.inv(H[g])
            for position, j in enumerate(order):
                table = table_of(tables, g, i, j, W.shape)
                codes[g, i, j] = int((table - w[j]).abs().argmin())
                change = w[j] - table[int(codes[g, i, j])]
                for k in order[position + 1 :]:
                    w[k] -= change / inverse[j, j] * inverse[j, k]
                inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("share", SHARES)
def test_codes_are_those_of_optimal_brain_quantization(share: tuple[int, int]) -> None:
    W, H = problem(3)
    fit = fit_codebook(W, H, scheme(share), rounds=0)
    metric = damped(H, 0.01)
    diagonal = H.diagonal(dim1=1, dim2=2).mean(0)
    order = sorted(range(6), key=lambda j: -float(diagonal[j]))
    assert torch.equal(
        fit.codebook.codes, brain_quantization(W, metric, fit.codebook.tables, order)
    )
    # The tables are k-means by the variance of each input given those rounded later.
    given = torch.zeros(2, 6, dtype=torch.float64)
    for position, j in enumerate(order):
        later = order[position + 1 :]
        for g in range(2):
            M, cross = metric[g][later][:, later], metric[g][j, later]
            given[g, j] = metric[g, j, j] - cross @ torch.linalg.solve(M, cross)
    assert torch.allclose(fit.codebook.tables, first_tables(W, given, scheme(share))[0])
    nearest = nearest_codes(W, fit.codebook.tables)
    book = Codebook(codes=nearest, tables=fit.codebook.tables)
    wanted = [float(loss_of(W, metric, decode(b)).sum()) for b in (book, fit.codebook)]
    assert fit.losses == pytest.approx(wanted, rel=1e-9)


@given(SEEDS, st.sampled_from(SHARES), st.sampled_from([2, 40]))
@settings(max_examples=25, deadline=None)
def test_refitted_entries_have_no_gradient_left(
    seed: int, share: tuple[int, int], n_rows: int
) -> None:
    W, H = problem(seed, n_rows=n_rows)  # two rows: singular
    tables, _ = first_tables(W, torch.ones(2, 6), scheme(share))
    codes = nearest_codes(W + 0.5 * normal(seed + 9, 2, 4, 6), tables)
    start = Codebook(codes=codes, tables=tables)
    fitted = refit_entries(W, H, start, tolerance=1e-9)
    assert bool((fitted.tables.diff(dim=2) >= 0).all())
    free = fitted.tables.clone().requires_grad_()
    Q = torch.stack(
        [
            table_of(free, g, i, j, W.shape)[int(fitted.codes[g, i, j])]
            for g in range(2)
            for i in range(4)
            for j in range(6)
        ]
    ).reshape(W.shape)
    loss = loss_of(W, H, Q).sum()
    loss.backward()
    size = float(loss_of(W, H, torch.zeros_like(W)).sum())
    assert free.grad is not None
    assert float(free.grad.abs().max()) <= 1e-6 * size
    before = float(loss_of(W, H, decode(start)).sum())
    assert float(loss.detach()) <= before * (1 + 1e-12)


def test_entries_without_codes_stay() -> None:
    W, H = problem(2)
    tables = torch.tensor([[[-1.0, 0.0, 1.0, 50.0]]], dtype=torch.float64)
    fitted = refit_entries(W, H, Codebook(codes=nearest_codes(W, tables), tables=tables))
    assert float(fitted.tables[0, 0, 3]) == 50


@given(SEEDS, st.sampled_from(SHARES))
@settings(max_examples=15, deadline=None)
def test_descent_ends_where_no_single_code_can_be_bettered(
    seed: int, share: tuple[int, int]
) -> None:
    W, H = problem(seed)
    tables, _ = first_tables(W, torch.ones(2, 6), scheme(share))
    start = Codebook(codes=nearest_codes(W, tables), tables=tables)
    one = descend_codes(W, H, start)
    end = descend_codes(W, H, start, sweeps=50)
    losses = [
        torch.einsum("gmi,gij,gmj->gm", W - decode(b), H, W - decode(b)) for b in (start, one, end)
    ]
    assert bool((losses[1] <= losses[0] * (1 + 1e-12)).all())
    assert bool((losses[2] <= losses[1] * (1 + 1e-12)).all())
    D = W - decode(end)
    for g in range(2):
        for i in range(4):
            for j in range(6):
                for entry in table_of(tables, g, i, j, W.shape):
                    d = D[g, i].clone()
                    d[j] = W[g, i, j] - entry
                    assert float(d @ H[g] @ d) >= float(losses[2][g, i]) * (1 - 1e-9)


@given(SEEDS, st.sampled_from(SHARES), st.integers(2, 6), st.sampled_from([3, 40]))
@example(seed=1703158, share=(4, 1), entries=4, n_rows=3)  # as many entries as values: no loss
@settings(max_examples=25, deadline=None)
def test_losses_fall_and_are_the_definition(
    seed: int, share: tuple[int, int], entries: int, n_rows: int
) -> None:
    W, H = problem(seed, n_rows=n_rows)
    fit = fit_codebook(W, H, scheme(share, entries), rounds=4)
    metric = damped(H, fit.damping)
    rounding = 1e-24 * float(loss_of(W, metric, torch.zeros_like(W)).sum())
    for before, after in zip(fit.losses[1:], fit.losses[2:], strict=False):
        assert after <= before * (1 + 1e-9) + rounding
    Q = decode(fit.codebook)
    found = float(loss_of(W, metric, Q).sum())
    assert fit.losses[-1] == pytest.approx(found, rel=1e-9, abs=rounding)
    assert torch.allclose(fit.loss, loss_of(W, H, Q), rtol=1e-9, atol=1e-12)
    assert int(fit.codebook.codes.max()) < entries
    assert fit.merged == 0


def test_the_best_of_all_codes_is_near() -> None:
    """Two entries a row: all codes of a row can be tried, each with its best entries."""
    total, least = 0.0, 0.0
    for seed in range(10):
        W, H = problem(seed, groups=1, outputs=1, inputs=7)
        metric = damped(H, 0.01)[0]
        fit = fit_codebook(W, H, scheme((1, 0), 2), rounds=8)
        best = float("inf")
        for bits in range(2**6):  # swapping both entries changes nothing
            chosen = torch.tensor([(bits >> j) & 1 for j in range(7)], dtype=torch.float64)
            S = torch.stack([chosen, 1 - chosen], 1)
            t = torch.linalg.lstsq(
                S.T @ metric @ S, S.T @ metric @ W[0, 0], driver="gelsd"
            ).solution
            d = W[0, 0] - S @ t
            best = min(best, float(d @ metric @ d))
        assert fit.losses[-1] >= best * (1 - 1e-9)
        total, least = total + fit.losses[-1], least + best
    assert total <= 1.35 * least


def test_every_step_is_worth_it() -> None:
    plain, weighted, feedback, full = 0.0, 0.0, 0.0, 0.0
    for seed in range(6):
        W, H = problem(seed, groups=1, outputs=24, inputs=32, n_rows=300)
        s = scheme((1, 0), 4)
        metric = damped(H, 0.01)
        for_all, _ = first_tables(W, torch.ones(1, 32), s)
        by_input, _ = first_tables(W, H.diagonal(dim1=1, dim2=2), s)
        plain += float(
            loss_of(W, metric, decode(Codebook(codes=nearest_codes(W, for_all), tables=for_all)))
        )
        weighted += float(
            loss_of(W, metric, decode(Codebook(codes=nearest_codes(W, by_input), tables=by_input)))
        )
        losses = fit_codebook(W, H, s, rounds=4).losses
        feedback, full = feedback + losses[1], full + losses[-1]
    assert weighted < 0.97 * plain
    assert feedback < 0.9 * weighted
    assert full < 0.9 * feedback


def test_degenerate_weights() -> None:
    W, H = problem(5)
    W[0, 0], W[:, :, 2] = 0.5, 0  # a constant row but for a zero column
    H[:, 3], H[:, :, 3] = 0, 0  # an input that is never active
    fit = fit_codebook(W, H, scheme((1, 0), 5))
    assert float((decode(fit.codebook)[0, 0] - W[0, 0]).abs().max()) <= 1e-12
    assert bool(decode(fit.codebook).isfinite().all())
    silent = fit_codebook(W, torch.zeros_like(H), scheme((0, 0), 4))
    assert float(silent.loss.sum()) == 0
    assert float((decode(silent.codebook) - W).abs().max()) < float(W.abs().max())
    few = fit_codebook(W.round(), H, scheme((0, 0), 16))  # fewer values than entries
    assert torch.allclose(decode(few.codebook), W.round(), atol=1e-9)
    one = fit_codebook(W[:1, :1, :1], H[:1, :1, :1], scheme((0, 0), 2))
    assert torch.allclose(decode(one.codebook), W[:1, :1, :1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_entries_are_values_of_their_type(value_dtype: torch.dtype, device: str) -> None:
    W, H = (v.to(device, torch.float32) for v in problem(6))
    before = W.clone(), H.clone()
    fit = fit_codebook(W, H, CodebookScheme(entries=4, outputs=2, value_dtype=value_dtype))
    tables = fit.codebook.tables
    assert torch.equal(tables, tables.to(value_dtype).double())
    assert fit.codebook.codes.dtype == torch.uint8
    assert tables.device.type == device
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])
    wanted = loss_of(W.double(), H.double(), decode(fit.codebook))
    assert torch.allclose(fit.loss, wanted, rtol=1e-9)


def test_messages() -> None:
    W, H = problem(0)
    with pytest.raises(ConfigError, match=r"entries must be 2\.\.256, got 257"):
        CodebookScheme(entries=257)
    with pytest.raises(ConfigError, match="must be >= 0; 0 is all"):
        CodebookScheme(outputs=-1)
    with pytest.raises(ConfigError, match="value_dtype must be a float type"):
        CodebookScheme(value_dtype=torch.int8)
    with pytest.raises(ShapeError, match=r"8 outputs do not split into blocks of 3"):
        fit_codebook(W, H, scheme((3, 0)))
    with pytest.raises(ShapeError, match=r"6 inputs do not split into blocks of 4"):
        fit_codebook(W, H, scheme((0, 4)))
    with pytest.raises(ConfigError, match="rounds must be >= 0, got -1"):
        fit_codebook(W, H, scheme((0, 0)), rounds=-1)
    with pytest.raises(NumericalError, match="found nan at group 0"):
        fit_codebook(W * torch.nan, H, scheme((0, 0)))


def test_a_trained_layer(lenet5: nn.Module, images: dict[str, Tensor]) -> None:
    """On held-out images the last but one layer of LeNet-5 loses half as much as by plain k-means."""
    linear = [m for m in lenet5.modules() if isinstance(m, nn.Linear)][1]
    seen: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        lenet5(images["train"])
        lenet5(images["test"])
    hook.remove()
    W = linear.weight.detach().double().unsqueeze(0)
    objective = objective_of(W, moments_of(seen[0].unsqueeze(1)))
    spread = seen[1] - seen[1].mean(0)

    def lost(Q: Tensor) -> float:
        return float((spread @ (W - Q)[0].T).square().sum() / (spread @ W[0].T).square().sum())

    s = CodebookScheme(entries=16)
    tables, _ = first_tables(W, torch.ones(1, W.shape[2]), s)
    plain = lost(decode(Codebook(codes=nearest_codes(W, tables), tables=tables)))
    assert lost(decode(fit_codebook(W, objective.H, s, damping=0.03).codebook)) < 0.5 * plain


@given(SEEDS, st.sampled_from(SHARES), st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_losses_on_the_way_are_those_of_their_weights(
    seed: int, share: tuple[int, int], rounds: int
) -> None:
    """They are added up from what each column gains, never from the weight."""
    weight, H = problem(seed)
    H[1] *= seed % 2  # a group without activity
    found = fit_codebook(weight, H, scheme(share), rounds=rounds)
    wanted = loss_of(weight, damped(H, found.damping), decode(found.codebook)).sum()
    assert found.losses[-1] == pytest.approx(float(wanted), rel=1e-9, abs=1e-12)
