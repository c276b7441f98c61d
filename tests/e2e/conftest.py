"""Finished runs of real networks, made once for all end-to-end tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.api.tiles import Tiles
from tersor.timing.protocol import Ratio
from tests.data.zoo import load_lenet5, load_resnet20
from tests.e2e.helpers import Accuracy, Finished, Recorded, brief_runs, parts, state_of, warm_copy

# A size that only int8 weights reach, whatever the machine's timings say.
LENET_TARGET = tersor.Target(size_ratio=3.0, drop_points=5.0)
RESNET_TARGET = tersor.Target(size_ratio=2.0, min_agreement=0.8)
# The last stage is left: 811 of the 1,080 kB in six of 21 convolutions, which are quicker to round.
RESNET_KEEP = ("stem", "fc", *(f"layers.{i}" for i in range(6)))
# No formats alone are that small.
PRUNED_TARGET = tersor.Target(size_ratio=8.0, drop_points=10.0)
FORMATS = ("quantize",)  # what most tests are about is quicker without widths


FOLDER = Path(__file__).parent
# The first test that asks for a finished run waits for it: a minute alone, more beside others.
WAIT_SECONDS = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if FOLDER in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(WAIT_SECONDS))


# Of AVX2: the kept counts of these tests are the same on every machine.
TILES = Tiles(native={"linear": (8,), "conv": (8,)})


@pytest.fixture(scope="session", autouse=True)
def _known_tiles() -> Iterator[None]:
    """Measuring them takes seconds for every store; ``test_reuse`` does it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.api.session.device_tiles", lambda *_: TILES)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_backend() -> Iterator[None]:
    """``backend="auto"`` races backends; most of these tests are about something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tersor.api.session.backend_names", lambda: ["openvino"])
        yield


@pytest.fixture(scope="session", autouse=True)
def _brief_runs() -> Iterator[None]:
    """How long builds are measured is tested in ``tests/unit``; the demo and the benchmarks use the defaults."""
    with brief_runs():
        yield


def finish(
    model: nn.Module,
    data: tersor.Data,
    target: tersor.Target,
    cache: Path,
    metrics: tuple[Accuracy | None, Accuracy | None] = (None, None),
    **options: Any,
) -> Finished:
    before, progress = state_of(model), Recorded()
    metric, test_metric = metrics
    result = tersor.compress(
        model,
        data,
        target=target,
        metric=metric,
        test_metric=test_metric,
        cache_dir=cache,
        progress=progress,
        **{"methods": FORMATS, **options},
    )
    uses = 0 if test_metric is None else len(test_metric.predictors)
    return Finished(
        model, before, data, metric, test_metric, progress, cache, result, uses_of_test_metric=uses
    )


@pytest.fixture(scope="session")
def lenet_run(images: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """LeNet-5 with both metrics; the model was in training mode when it was given."""
    metric = Accuracy(images["train"][60:100], images["train_labels"][60:100])
    held_out = Accuracy(images["test"][40:80], images["test_labels"][40:80])
    cache = tmp_path_factory.mktemp("lenet") / "cache"
    model = load_lenet5().train()
    return finish(model, parts(images), LENET_TARGET, cache, (metric, held_out))


@pytest.fixture(scope="session")
def resnet_run(images: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """ResNet-20 without a metric, from a labelled loader that is split here."""
    chosen = torch.utils.data.TensorDataset(images["train"][:100], images["train_labels"][:100])
    loader = torch.utils.data.DataLoader(chosen, batch_size=32)
    data = tersor.Data(loader, to_inputs=lambda batch: batch[0], output="logits")
    cache = tmp_path_factory.mktemp("resnet") / "cache"
    return finish(load_resnet20(), data, RESNET_TARGET, cache, keep=RESNET_KEEP)


@pytest.fixture(scope="session")
def pruned_run(images: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """LeNet-5 with every method, for a size that needs fewer units as well as fewer bits."""
    metric = Accuracy(images["train"][60:100], images["train_labels"][60:100])
    cache = tmp_path_factory.mktemp("pruned") / "cache"
    return finish(load_lenet5(), parts(images), PRUNED_TARGET, cache, (metric, None), methods="all")


@pytest.fixture(params=["lenet_run", "resnet_run"])
def finished(request: pytest.FixtureRequest) -> Finished:
    """Each finished run in turn."""
    run: Finished = request.getfixturevalue(request.param)
    return run


@pytest.fixture(scope="session")
def lenet_file(lenet_run: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The saved artifact of the LeNet-5; read only."""
    path = tmp_path_factory.mktemp("saved") / "lenet.tersor"
    lenet_run.result.save(path)
    return path


@pytest.fixture
def again(lenet_run: Finished, tmp_path: Path) -> Callable[..., tersor.api.result.Result]:
    """``compress`` on the LeNet-5 with its prices at hand; options may be changed."""
    store = warm_copy(lenet_run, tmp_path)

    def compress(target: object = LENET_TARGET, **options: object) -> tersor.api.result.Result:
        settings = {"cache_dir": store, "progress": False, "methods": FORMATS, **options}
        model = settings.pop("model", None) or load_lenet5()
        data = settings.pop("data", lenet_run.data)
        return tersor.compress(model, data, target=target, **settings)

    return compress


@pytest.fixture
def never_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings of a busy machine do not decide what is returned."""

    def calm(speed: Ratio) -> bool:
        del speed
        return False

    monkeypatch.setattr("tersor.api.result.is_slower", calm)


class Tiny(nn.Module):
    """Three linear layers over one row of an image: quick to build and to price."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(28, 64), nn.Linear(64, 32), nn.Linear(32, 5)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 6

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.middle(self.first(x).relu()).relu())
        return found


@pytest.fixture
def tiny() -> nn.Module:
    return Tiny().eval()


@pytest.fixture
def tiny_data(images: dict[str, Tensor]) -> tersor.Data:
    """One row of 90 images."""
    return tersor.Data([images["train"][:90, 0, 14]], output="values")
