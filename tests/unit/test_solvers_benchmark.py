"""The parts of ``benchmarks.solvers`` that need no model: peers' arithmetic, errors, records, tables."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.solvers import peers, ranks, sparse
from benchmarks.solvers.layers import Layer, held_error
from benchmarks.solvers.peers import Grid
from benchmarks.solvers.rows import Cell, Row, layer_ratio, read, table_text
from benchmarks.solvers.structured import global_kept, uniform_kept, uniform_share
from tersor.ops.moments import moments_of
from tersor.ops.sparsity import NofM, Unstructured


def _layer(outputs: int = 12, inputs: int = 32, count: int = 400) -> tuple[Layer, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.float64) @ mix + 1
    weight = torch.randn(1, outputs, inputs, generator=generator, dtype=torch.float64)
    moments = moments_of(x.unsqueeze(1))
    return Layer(name="a", weight=weight, kernel=(), halves=(moments,), rows=x.float()), x


def _error(layer: Layer, new: Tensor) -> float:
    D = layer.weight - new
    return float(((D @ layer.second_moment) * D).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 8, 12])
def test_rounding_to_nearest_is_within_half_a_step_of_its_own_group(
    symmetric: bool, group: int
) -> None:
    layer, _ = _layer()
    grid, W = Grid(bits=4, group=group, symmetric=symmetric), layer.weight[0]
    off = (peers.nearest(W, grid) - W).abs()
    for part, error in zip(W.split(grid.width(32), 1), off.split(grid.width(32), 1), strict=True):
        step, _ = peers.parameters(part, grid)
        # The largest weight of a symmetric grid has no code of its own: it lies half a step beyond the last.
        assert bool((error <= step.unsqueeze(1) * (0.5 + 1e-9)).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_without_correlations_is_rounding_to_nearest(symmetric: bool) -> None:
    layer, _ = _layer()
    grid, W = Grid(bits=3, group=8, symmetric=symmetric), layer.weight[0]
    found = peers.gptq(W, torch.eye(32, dtype=torch.float64), grid)
    torch.testing.assert_close(found, peers.nearest(W, grid), rtol=0, atol=1e-12)


def test_gptq_uses_the_codes_of_its_groups_and_beats_rounding_to_nearest() -> None:
    layer, _ = _layer()
    grid, W = Grid(bits=3, group=8, symmetric=True), layer.weight[0]
    found = peers.gptq(W, layer.second_moment[0], grid)
    steps = [peers.parameters(part, grid) for part in W.split(8, 1)]
    for part, (step, zero) in zip(found.split(8, 1), steps, strict=True):
        codes = part / step.unsqueeze(1) + zero.unsqueeze(1)
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-9)
        assert float(codes.min()) >= -1e-9
        assert float(codes.max()) <= grid.top + 1e-9
    assert _error(layer, found[None]) < _error(layer, peers.nearest(W, grid)[None])


def test_searched_steps_lose_no_more_than_those_of_the_whole_range() -> None:
    layer, _ = _layer()
    grid, W = Grid(bits=2, group=8, symmetric=False), layer.weight[0]
    losses = [
        sum(
            (peers.rounded(p, *peers.parameters(p, grid, search=search), grid) - p)
            .abs()
            .pow(2.4)
            .sum()
            for p in W.split(8, 1)
        )
        for search in (True, False)
    ]
    assert float(losses[0]) <= float(losses[1])


def test_learnt_rounding_is_no_worse_than_where_it_began() -> None:
    layer, _ = _layer()
    grid, W = Grid(bits=3, group=8, symmetric=False), layer.weight[0]
    assert layer.rows is not None
    begun = peers.auto_round(W, layer.rows, grid, iterations=1)
    found = peers.auto_round(W, layer.rows, grid, iterations=60)
    assert _error(layer, found.double()[None]) < _error(layer, begun.double()[None])


def test_the_held_error_is_that_of_rows() -> None:
    layer, x = _layer()
    fresh = x[:50] * 1.5 - 0.3
    new = layer.weight + 0.1
    D = (layer.weight - new)[0]
    shift = (x @ D.T).mean(0)
    out = fresh @ layer.weight[0].T
    wanted = (fresh @ D.T - shift).square().sum(1).mean() / (out - out.mean(0)).square().sum(
        1
    ).mean()
    found = held_error(layer.weight, new, layer.moments, moments_of(fresh.unsqueeze(1)))
    assert found == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("share", [0.8, 0.4])
def test_factors_hold_no_more_than_their_share_and_the_whitened_ones_win(share: float) -> None:
    layer, _ = _layer()
    rank = ranks.rank_at(12, 32, share)
    assert rank * (12 + 32) <= share * 12 * 32
    found = {name: method(layer, share) for name, (method, _) in ranks.METHODS.items()}
    for new in found.values():
        assert int(torch.linalg.matrix_rank(new[0])) <= rank
    errors = {name: _error(layer, new) for name, new in found.items()}
    assert errors["SVD-LLM"] == min(errors.values())  # the optimum of the metric that has no bias
    held = {
        name: held_error(layer.weight, new, layer.moments, layer.moments)
        for name, new in found.items()
    }
    assert held["ours"] <= min(held.values()) * (1 + 1e-3)  # damping


@pytest.mark.parametrize("pattern", [Unstructured(kept=0.5), NofM(kept=2, of=4)])
def test_sparse_methods_keep_what_the_pattern_says(pattern: Unstructured | NofM) -> None:
    layer, _ = _layer()
    errors = {}
    for name, (method, _) in sparse.METHODS.items():
        new = method(layer, pattern)
        assert int((new != 0).sum()) <= 12 * 32 // 2
        if isinstance(pattern, NofM):
            assert int((new.reshape(1, 12, 8, 4) != 0).sum(3).max()) <= 2
        errors[name] = held_error(layer.weight, new, layer.moments, layer.moments)
    assert errors["ours"] == min(errors.values())


def test_counts_of_a_budget() -> None:
    units = [16, 32]

    def cost(counts: list[int]) -> float:
        return float(sum(counts))

    share = uniform_share(units, cost, 24)  # type: ignore[arg-type]
    assert sum(uniform_kept(units, share)) == 24
    scores = [torch.arange(16.0), torch.arange(32.0)]
    kept = global_kept(scores, cost, 20)  # type: ignore[arg-type]
    # The 20 highest: 18 of the second and 2 of the first tie at 14 and 15.
    assert [len(k) for k in kept] == [2, 18]
    assert kept[0].tolist() == [14, 15]


def _row(method: str, *errors: float) -> Row:
    layers = {f"l{i}": e for i, e in enumerate(errors)}
    return Row(table="t", model="m", setting="s", method=method, layers=layers, quality={"q": 0.5})


def test_ratios_are_over_layers_of_equal_seeds() -> None:
    ours = Cell(rows=[_row("ours", 1.0, 4.0)], seeds=[3])
    theirs = Cell(rows=[_row("GPTQ", 9.0, 9.0), _row("GPTQ", 2.0, 2.0)], seeds=[0, 3])
    assert layer_ratio(ours, theirs) == pytest.approx(1.0)  # sqrt(1/2 * 4/2)
    assert math.isnan(layer_ratio(ours, Cell(rows=[_row("GPTQ", 1.0)], seeds=[1])))


def test_the_last_record_of_a_row_counts_and_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    entries = [
        {"seed": 0, "row": {"table": "t", "model": "m", "setting": "s", "method": name, "mode": "layer",
                            "layers": {"a": error}, "quality": {}, "source": "x", "detail": {}}}
        for name, error in (("GPTQ", 0.5), ("ours", 0.9), ("ours", 0.25))
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(e) for e in entries))
    found = list(read(path))
    assert [(seed, row.method, row.error) for seed, row in found] == [
        (0, "GPTQ", 0.5),
        (0, "ours", 0.25),
    ]
    text = table_text(found, "t", "m")
    assert "| ours | layer | 0.25000 | 0.500 | 1 |" in text
    assert list(read(tmp_path / "absent.jsonl")) == []
