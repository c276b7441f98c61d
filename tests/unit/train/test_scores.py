"""Saliencies by definition, the mean over looks, and which units die."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tersor.train.scores import DECAY, Scores, lowest
from tersor.train.structure import find_structure
from tersor.train.units import Units
from tests.unit.capturing import random, trained
from tests.unit.train.networks import Convolutional


def test_a_units_saliency_is_the_sum_of_weight_times_gradient() -> None:
    model = trained(Convolutional())
    structure = find_structure(model, random(2, 1, 8, 8))
    units = Units.of(model, list(structure.groups.values()))
    model(random(3, 1, 8, 8)).square().sum().backward()
    found = units.saliency()["blocks.0.conv1"]
    block = model.blocks[0]
    rows = (block.conv1.weight * block.conv1.weight.grad).sum((1, 2, 3))
    scale = block.bn1.weight * block.bn1.weight.grad
    shift = block.bn1.bias * block.bn1.bias.grad
    torch.testing.assert_close(found, (rows + scale + shift).detach())


def test_the_mean_forgets_and_counts_looks() -> None:
    layer = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    structure = find_structure(layer, random(2, 3))
    units = Units.of(layer, list(structure.groups.values()))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scores, seen = Scores(), []
    for seed in (1, 2, 3):
        optimizer.zero_grad()
        layer(random(5, 3, seed=seed)).sum().backward()
        seen.append(units.saliency()["0"].square())
        scores.update(units, optimizer)
    wanted = seen[0]
    for value in seen[1:]:
        wanted = DECAY * wanted + (1 - DECAY) * value
    torch.testing.assert_close(scores.values["0"], wanted)
    assert scores.looks == 3


def test_a_skipped_step_and_a_scaled_gradient_change_nothing() -> None:
    layer = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    structure = find_structure(layer, random(2, 3))
    units = Units.of(layer, list(structure.groups.values()))
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    plain, scaled = Scores(), Scores()
    layer(random(5, 3)).sum().backward()
    plain.update(units, optimizer)
    for p in layer.parameters():
        p.grad *= 1024.0
    optimizer.grad_scale, optimizer.found_inf = (
        torch.tensor(1024.0),
        torch.tensor(0.0),
    )  # as fused ones have
    scaled.update(units, optimizer)
    torch.testing.assert_close(scaled.values["0"], plain.values["0"])
    for p in layer.parameters():
        p.grad.fill_(torch.inf)
    optimizer.found_inf = torch.tensor(1.0)
    scaled.update(units, optimizer)
    torch.testing.assert_close(scaled.values["0"], plain.values["0"])


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.data())
def test_the_lowest_are_as_many_as_asked_and_stable(
    seed: int, units: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(units, generator=generator)
    count = data.draw(st.integers(0, units))
    first = lowest(scores, count, None, 0.05)
    assert int(first.sum()) == count
    if 0 < count < units:
        assert float(scores[first].max()) <= float(scores[~first].min())
    # Scores that move by less than the margin change no choice.
    moved = scores * (1 + 0.02 * (torch.rand(units, generator=generator) - 0.5))
    assert torch.equal(lowest(moved, count, first, 0.05), first)


def test_a_dead_unit_that_is_clearly_better_comes_back() -> None:
    dead = torch.tensor([True, False, False])
    assert lowest(torch.tensor([1.04, 1.0, 2.0]), 1, dead, 0.05).tolist() == [True, False, False]
    assert lowest(torch.tensor([1.06, 1.0, 2.0]), 1, dead, 0.05).tolist() == [False, True, False]


def test_equal_scores_choose_the_first() -> None:
    assert lowest(torch.zeros(4), 2, None, 0.05).tolist() == [True, True, False, False]


def test_units_without_gradients_have_no_score() -> None:
    layer = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    structure = find_structure(layer, random(2, 3))
    units = Units.of(layer, list(structure.groups.values()))
    assert units.saliency() == {}
    with pytest.raises(KeyError):
        units.saliency()["0"]
