"""Attach with a target: prices of real builds decide the counts, and the small model is measured."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tersor
from tersor.artifact import read_artifact
from tersor.core.errors import ConfigError, TargetError
from tersor.price.price import PriceConfig
from tersor.train.report import Report
from tersor.train.schedule import Schedule
from tests.data.zoo import load_lenet5
from tests.e2e.helpers import quick_runs
from tests.unit.train.networks import Convolutional

STEPS = 40
SCHEDULE = Schedule(total_steps=STEPS, begin=0.1, end=0.5, every=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of prices, which are the same whatever the target is."""
    return tmp_path_factory.mktemp("prices")


def train(
    model: nn.Module, images: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer
) -> None:
    for step in range(STEPS):
        index = torch.randint(len(images), (16,), generator=torch.Generator().manual_seed(step))
        functional.cross_entropy(model(images[index]), labels[index]).backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(
    images: dict[str, Tensor], folder: Path, target: tersor.Target
) -> tuple[nn.Module, nn.Module, Report]:
    """LeNet-5 before and after a run towards a target."""
    model = load_lenet5()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    with quick_runs(PriceConfig(k=4, held_out=1)):
        shrinker = tersor.train.attach(
            model,
            optimizer,
            images["train"][:8],
            target=target,
            total_steps=STEPS,
            schedule=SCHEDULE,
            cache_dir=folder,
            progress=False,
        )
        train(model, images["train"], images["train_labels"], optimizer)
        small, report = shrinker.finish()
    return model, small, report


def test_a_speed_is_planned_reached_and_measured(images: dict[str, Tensor], store: Path) -> None:
    model, small, report = trained(images, store, tersor.Target(speedup=1.5))
    assert small is model
    assert any(row.kept < row.units for row in report.groups)
    assert report.predicted_ms is not None
    assert report.measured is not None
    assert report.measured.small.median_ms > 0
    assert report.measured.small_bytes < report.measured.dense_bytes
    assert "widths cut" in report.describe()


def test_a_size_is_planned_without_looking_at_speed(images: dict[str, Tensor], store: Path) -> None:
    _, _, report = trained(images, store, tersor.Target(size_ratio=4))
    assert report.parameters_after <= report.parameters_before / 4


def test_a_target_out_of_reach_gives_the_fewest_units_and_says_what_binds(
    images: dict[str, Tensor], store: Path
) -> None:
    _, _, report = trained(images, store, tersor.Target(speedup=10_000))
    (note,) = [n for n in report.notes if "can't be met" in n]
    assert "latency binds" in note


def test_quality_is_no_promise_of_training(images: dict[str, Tensor]) -> None:
    model = Convolutional()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TargetError, match="min_agreement"):
        tersor.train.attach(
            model,
            optimizer,
            images["train"][:4],
            target=tersor.Target(speedup=2, min_agreement=0.9),
            total_steps=STEPS,
            schedule=SCHEDULE,
        )


def test_wrappers_with_flat_parameters_are_refused_by_name(images: dict[str, Tensor]) -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Parameter(torch.zeros(4))

    model = FullyShardedDataParallel()
    with pytest.raises(ConfigError, match="flat pieces"):
        tersor.train.attach(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            images["train"][:4],
            counts={},
            total_steps=STEPS,
            schedule=SCHEDULE,
        )


def test_a_file_holds_weights_of_few_bits_as_training_left_them(
    images: dict[str, Tensor], tmp_path: Path
) -> None:
    """Compress looks for the grid on which they lie, and finds it: nothing is lost a second time."""
    model = load_lenet5()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    shrinker = tersor.train.attach(
        model, optimizer, images["train"][:8], bits=4, total_steps=STEPS, schedule=SCHEDULE
    )
    train(model, images["train"], images["train_labels"], optimizer)
    small, report = shrinker.finish()
    layers = {row.layer: row.weights for row in report.rounded}
    assert set(layers) == {"c2", "f1", "f2"}
    data = tersor.Data(
        calibration=[images["train"][:60]],
        search=[images["train"][60:100]],
        test=[images["test"][:40]],
        output="logits",
    )
    with quick_runs(PriceConfig(k=4, held_out=1), low_bits=("int4_weight",)):
        result = tersor.compress(
            small.eval(),
            data,
            target=tersor.Target(size_mb=0.235),  # 1.7 MB in floats, 0.229 in 4 bits
            methods=("quantize",),
            cache_dir=tmp_path / "cache",
            progress=False,
        )
        result.save(tmp_path / "lenet.tersor")
    few = {s for s, level in result.plan.assignment.items() if level == "int4_weight"}
    assert "f1" in few  # 93 % of all weights; of the others timings may decide
    opened = read_artifact(tmp_path / "lenet.tersor")
    expanded = {
        tuple(p.packing.shape): torch.from_numpy(p.expand()) for p in opened.packed.values()
    }
    for layer in few:
        weight = small.get_submodule(layer).weight.detach()
        assert torch.equal(expanded[tuple(weight.shape)].reshape(weight.shape), weight), layer
