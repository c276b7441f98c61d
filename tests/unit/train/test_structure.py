"""Groups of real modules: found, cut in place, undone, and equal to zeroing them."""

import pytest
import torch
from torch import Tensor, nn

from tersor.capture.samples import flatten_item
from tersor.core.errors import CaptureError, DataError
from tersor.train.cutting import cut_, zeroed
from tersor.train.groups import Group
from tersor.train.literals import literals_after
from tersor.train.probe import Probe
from tersor.train.structure import Structure, find_structure
from tersor.train.trial import TOLERANCE
from tests.data.zoo import load_lenet5, load_resnet20
from tests.unit.capturing import random, trained
from tests.unit.train.networks import Convolutional, Depthwise, Encoder


def probe_of(x: Tensor) -> Probe:
    return Probe.of(*flatten_item(x, "example"))


def thirds(groups: list[Group]) -> dict[str, Tensor]:
    """All units but each third one, as many as must stay at the least."""
    found = {}
    for group in groups:
        index = torch.arange(group.units)
        kept = index[index % 3 != 1]
        found[group.name] = kept if len(kept) >= group.least else index
    return found


CASES = {
    "convolutional": (Convolutional, (2, 1, 8, 8)),
    "depthwise": (Depthwise, (2, 3, 8, 8)),
    "encoder": (Encoder, (2, 5, 16)),
    "lenet5": (load_lenet5, (2, 1, 28, 28)),
    "resnet20": (load_resnet20, (2, 1, 28, 28)),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Structure]:
    make, shape = CASES[request.param]
    model = (
        trained(make()) if request.param in ("convolutional", "depthwise", "encoder") else make()
    )
    x = random(*shape)
    return model, x, find_structure(model, x)


def test_cutting_computes_what_zeroing_does(case: tuple[nn.Module, Tensor, Structure]) -> None:
    model, x, structure = case
    groups, probe = list(structure.groups.values()), probe_of(x)
    kept = thirds(groups)
    plain = probe.run(model)[0]
    with zeroed(model, groups, kept):
        wanted = probe.run(model)[0]
    cut = cut_(model, groups, kept, literals_after(structure.axes, kept))
    (found,) = probe.run(model)
    scale = float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= TOLERANCE * scale
    assert float((wanted - plain).abs().max()) > 100 * TOLERANCE * scale  # the check can fail
    small = sum(p.numel() for p in model.parameters())
    cut.undo()
    assert small < 0.9 * sum(p.numel() for p in model.parameters())
    assert torch.equal(probe.run(model)[0], plain)


def test_parameters_keep_their_identity_and_modules_know_their_sizes() -> None:
    model = trained(Depthwise())
    before = {n: id(p) for n, p in model.named_parameters()}
    structure = find_structure(model, random(2, 3, 8, 8))
    (group,) = structure.groups.values()
    assert group.units == 12
    kept = {group.name: torch.tensor([0, 2, 5, 7, 11])}
    cut_(model, [group], kept, literals_after(structure.axes, kept))
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert (model.expand.out_channels, model.each.groups, model.each.in_channels) == (5, 5, 5)
    assert (model.norm.num_features, model.project.in_channels) == (5, 5)
    assert len(model.norm.running_mean) == 5


def test_the_callers_model_is_not_changed_by_looking_at_it() -> None:
    model = trained(Convolutional()).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    find_structure(model, random(2, 1, 8, 8))
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_the_code_holds_is_named_with_its_reason() -> None:
    structure = find_structure(trained(Encoder()), random(2, 5, 16))
    assert list(structure.groups) == ["up"]
    reasons = {h.name: h.reason for h in structure.held}
    heads = [r for n, r in reasons.items() if n.startswith("qkv")]
    assert heads
    assert all("forward() fails with fewer units" in r or "once units are cut" in r for r in heads)


def test_frozen_and_named_layers_stay_whole() -> None:
    model = trained(Convolutional())
    model.blocks[0].conv1.weight.requires_grad_(requires_grad=False)
    structure = find_structure(model, random(2, 1, 8, 8), keep=("blocks.1.conv1",))
    reasons = {h.name: h.reason for h in structure.held}
    assert "frozen" in reasons["blocks.0.conv1"]
    assert reasons["blocks.1.conv1"] == "named in keep"


def test_resnet20_shrinks_inside_of_its_blocks_and_along_its_stages() -> None:
    structure = find_structure(load_resnet20(), random(2, 1, 28, 28))
    assert {"layers.0.conv1", "layers.4.conv1", "layers.8.conv1"} <= set(structure.groups)
    widths = {g.units for g in structure.groups.values()}
    assert widths == {16, 32, 64}


def test_tied_weights_are_cut_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 6)
            self.again = nn.Linear(4, 6)
            self.again.weight = self.up.weight
            self.down = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)) + torch.relu(self.again(x)))

    model = trained(Tied())
    structure = find_structure(model, random(3, 4))
    (group,) = structure.groups.values()
    cut_(model, [group], {group.name: torch.tensor([1, 4])})
    assert model.up.weight is model.again.weight
    assert model.up.weight.shape == (2, 4)
    assert model.up.out_features == model.again.out_features == 2
    assert model(random(3, 4)).shape == (3, 2)


def test_an_example_with_labels_is_refused() -> None:
    with pytest.raises(DataError, match="without labels"):
        find_structure(Convolutional(), (random(2, 1, 8, 8), torch.zeros(3)))


def test_a_model_that_cannot_be_exported_says_why() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(CaptureError, match="control flow"):
        find_structure(Branching(), random(2, 4))


def test_the_structure_holds_no_second_copy_of_the_weights() -> None:
    structure = find_structure(load_lenet5(), random(2, 1, 28, 28))
    tensors = list(structure.axes.graph.module.state_dict().values())
    assert sum(t.numel() for t in tensors) > 400_000
    assert sum(t.untyped_storage().nbytes() for t in tensors) < 1_000
