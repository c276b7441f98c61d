"""The whole of compress on a card, with few builds that are measured briefly: what it is about is that it ends."""

from pathlib import Path

import pytest
import torch
from torch import nn

import tersor
from tersor.backends.inductor import options
from tersor.core.errors import BackendError
from tersor.core.records import FloatChoice
from tersor.price.price import PriceConfig
from tests.data.zoo import load_fashion, load_lenet5
from tests.e2e.helpers import Accuracy, Recorded, quick_runs

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]
BATCH = 256
BRIEFLY = PriceConfig(k=3, k_mixed=4, held_out=1)


@pytest.fixture(scope="module", autouse=True)
def _card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def _few_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two uncompressed builds of eighteen: with all of them, a search for kernels among them, it takes minutes."""
    every = options.float_choices

    def few(device: str, *, can_compile: bool) -> tuple[FloatChoice, ...]:
        found = every(device, can_compile=can_compile)
        odd = ("tf32", "half", "blocks")
        plain = [c for c in found if not set(odd) & set(c.options) and c.precision == "bf16"]
        return tuple(c for c in plain if c.options["mode"] == "compile") or found

    monkeypatch.setattr(options, "float_choices", few)


class Wide(nn.Module):
    """Linears whose inputs differ so much in size that 8-bit floats err less than int8 there."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.down(torch.relu(self.up(x.pow(5) / 30)))
        return found


def test_a_plan_is_priced_built_and_saved(tmp_path: Path) -> None:
    train, test = load_fashion()
    model, progress = load_lenet5(), Recorded()
    with quick_runs(BRIEFLY):
        result = tersor.compress(
            model, tersor.Data(train.images, output="logits"), target="1.1x, 3 pt", metric=Accuracy(test.images, test.labels),
            device="cuda", batch=BATCH, cache_dir=tmp_path / "cache", progress=progress,
        )  # fmt: skip
    assert result.plan.choice.backend == "inductor"
    assert result.plan.choice.device == "cuda"
    assert {"tiles", "baseline", "price", "plan", "build", "verify"} <= {*progress.stages}
    result.save(tmp_path / "lenet.tersor")
    x = test.images[:BATCH]
    found = torch.from_numpy(tersor.load(tmp_path / "lenet.tersor", device="cuda")(x.numpy()))
    with torch.no_grad():
        wanted = result.model(x)
    assert (found.argmax(1) == wanted.argmax(1)).double().mean() > 0.98
    with pytest.raises(BackendError, match="was built for cuda"):
        tersor.load(tmp_path / "lenet.tersor", device="cpu")


def test_eight_bit_floats_are_priced_where_they_err_less(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, rows = Wide().eval(), torch.randn(1024, 256)
    with quick_runs(BRIEFLY):
        result = tersor.compress(
            model, tersor.Data(list(rows.split(256)), output="values"),
            target=tersor.Target(speedup=1.01, min_agreement=0.5), device="cuda", batch=BATCH,
            methods=("quantize",), cache_dir=tmp_path / "cache", progress=False,
        )  # fmt: skip
    levels = {v for t in result._run.prices.tables for row in t.ops.values() for v in row}
    assert "fp8" in levels
    assert "int8" not in levels
