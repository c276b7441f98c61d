"""A size that no 8-bit weight reaches: low bits, tables and zeros, from the plan to the file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tersor
from tersor.artifact import read_artifact
from tersor.core.formats import PACKED
from tersor.graph.low_bits import LOW_BITS
from tersor.price.price import PriceConfig
from tests.data.zoo import load_resnet20
from tests.e2e.helpers import Recorded, close_logits, quick_runs
from tests.e2e.test_without_torch import PROGRAM

# Every family at every layer takes a minute and more. In every run int4 goes from a plan to a file in
# test_attach, a table in test_third_party, and each kind of bits through files in tests/conformance.
pytestmark = pytest.mark.slow
# A first look at a table or a mask takes about a second a layer and level, so that only the last stage is
# free: 811 of the 1,080 kB. In 8 bits 203 of them are left, and 472 in all.
KEEP = ("stem", "fc", *(f"layers.{i}" for i in range(6)))
TARGET = tersor.Target(size_mb=0.4)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with quick_runs(PriceConfig(k=4, held_out=1), low_bits=tuple(LOW_BITS)):
        yield


@pytest.fixture(scope="module")
def result(
    images: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> "tersor.api.result.Result":
    train, test = images["train"], images["test"]
    data = tersor.Data(
        calibration=[train[:60]], search=[train[60:100]], test=[test[:40]], output="logits"
    )
    found = tersor.compress(
        load_resnet20(),
        data,
        target=TARGET,
        methods=("quantize", "codebook", "sparsify"),
        keep=KEEP,
        cache_dir=tmp_path_factory.mktemp("storage") / "cache",
        progress=Recorded(),
    )
    _ = found.verdict
    return found


@pytest.fixture(scope="module")
def path(result: "tersor.api.result.Result", tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("saved") / "resnet.tersor"
    result.save(found)
    return found


def test_the_plan_takes_packed_levels_and_says_their_size(
    result: "tersor.api.result.Result", path: Path
) -> None:
    packed = [level for level in result.plan.assignment.values() if level in PACKED]
    assert len(packed) > 3
    verdict = result.verdict
    assert not verdict.returned_baseline
    written = read_artifact(path).manifest.verdict
    assert written is not None
    assert path.stat().st_size == written.size_bytes
    assert written.size_bytes <= 400_000
    assert written.size_bytes == pytest.approx(result.plan.predicted_bytes, rel=0.05)
    check = next(c for c in verdict.checks if c.name == "size_mb")
    assert check.status == "pass"


def test_the_file_holds_the_bits(result: "tersor.api.result.Result", path: Path) -> None:
    opened = read_artifact(path)
    chosen = [s for s, level in result.plan.assignment.items() if level in PACKED]
    assert len(opened.packed) == len(chosen)
    levels = {level for level in result.plan.assignment.values() if level in PACKED}
    kinds = {"int": "grid", "lut": "table", "spa": "sparse"}
    wanted = {"pairs" if "2of4" in v else kinds[v[:3]] for v in levels}
    assert {p.packing.kind for p in opened.packed.values()} == wanted
    for name, packed in opened.packed.items():
        assert np.array_equal(opened.tensors[name].to_numpy(), packed.expand())


def test_the_loaded_runner_gives_the_same_bits(
    result: "tersor.api.result.Result", path: Path, images: dict[str, Tensor]
) -> None:
    x = images["test"][:16]
    found, loaded = result.model(x), tersor.load(path)(x)
    assert torch.equal(found, loaded)
    assert close_logits(found, result.module(x))


def test_it_loads_without_torch(
    result: "tersor.api.result.Result", path: Path, images: dict[str, Tensor], tmp_path: Path
) -> None:
    import subprocess
    import sys

    from tests.e2e.helpers import environment

    batch = images["test"][:7].numpy()
    given, program = tmp_path / "given.npz", tmp_path / "program.py"
    np.savez(given, images=batch, wanted=result.model(batch))
    program.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, program, path, given, "block"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_family_was_on_offer_and_is_explained(result: "tersor.api.result.Result") -> None:
    levels = result._run.offered.levels()
    large = [site for site, own in levels.items() if PACKED & set(own)]
    assert len(large) >= 6
    assert all(set(levels[site]) >= PACKED for site in large)
    explained = result.explain(large[0])
    assert {row["level"] for row in explained["alternatives"]} & PACKED
