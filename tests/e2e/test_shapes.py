"""Shapes as build choices, on real models: what is offered, that it runs, is saved and loaded.

Times decide nothing here: which choice is faster is said by the tests.
"""

import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.api import shaping
from tersor.api.judging import runner_for
from tersor.api.result import Result
from tersor.api.session import Settings, open_session
from tersor.api.stages import baselines, build_for
from tersor.artifact.file import artifact_bytes, verify_artifact
from tersor.build.padding import EXACT
from tersor.core.errors import ArtifactError, DataError
from tersor.core.records import BaselineRow, Bucket, ShapeMode, Timing
from tersor.graph.routed import Routed
from tersor.price.price import PriceConfig
from tests.e2e.helpers import Recorded, environment, error_of, quick_runs
from tests.unit.capturing import random, trained

# Normalised squared error of a build: an int8 value between two codes may fall to either side.
ROUNDED = 1e-2
LENGTHS = (5, 9, 9, 9, 14, 20)
SIZES = ((24, 40), (40, 24), (24, 40), (32, 32))


@contextmanager
def choosing(mode: ShapeMode) -> Iterator[None]:
    """A run that measures briefly and takes one shape choice for the fastest."""

    def rigged(timings: dict[str, Timing], *args: Any) -> dict[str, Timing]:
        del args
        fast = {"open": 3.0, "exact": 3.0, "padded": 3.0, mode: 2.0}
        return {name: flat_timing(fast[name]) for name in timings}

    def curve(calls: Iterable[str], *args: Any) -> dict[str, Timing]:
        """What a call takes by its size: a build for one size half as long, so that buckets pay."""
        del args
        costs = {"single": 0.5, "open": 1.0}
        named = {name: name.split() for name in calls}
        return {
            n: flat_timing(costs[kind] * (1 + int(size) / 10)) for n, (kind, size) in named.items()
        }

    with quick_runs(PriceConfig(k=3, k_mixed=6, held_out=1)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(shaping, "measure_calls", lambda _, calls, *rest: rigged(calls, *rest))
        patch.setattr(shaping, "measure", curve)
        yield


def flat_timing(ms: float) -> Timing:
    return Timing(median_ms=ms, low_ms=ms, high_ms=ms, rounds_ms=(ms,) * 7, runs=7)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        vocab_size=50, max_position_embeddings=32,
    )  # fmt: skip
    model: nn.Module = transformers.BertModel(config).eval()
    return model


def sentence(count: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (count, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, length - 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def sentences(count: int = 60) -> tersor.Data:
    items = [sentence(2, LENGTHS[i % len(LENGTHS)], i) for i in range(count)]
    return tersor.Data(items, output="embedding")


class Pooled(nn.Module):
    """Convolutions and a mean over all places: borders and the mean feel every padded one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        return {"map": y, "logits": self.head(y.mean((2, 3)))}


def pictures(count: int = 60) -> tersor.Data:
    return tersor.Data(
        [random(2, 3, *SIZES[i % len(SIZES)], seed=i) for i in range(count)], output="values"
    )


def compressed(model: nn.Module, data: tersor.Data, cache: Path, **options: Any) -> Result:
    target = tersor.Target(size_ratio=1.2, drop_points=20.0)
    return tersor.compress(
        model, data, target=target, methods="quantize", cache_dir=cache, backend="openvino",
        **{"progress": False} | options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def text_model() -> nn.Module:
    return bert()


@pytest.fixture(scope="module")
def text(text_model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Result:
    with choosing("padded"):
        return compressed(text_model, sentences(), tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def image_model() -> nn.Module:
    return trained(Pooled())


def shapes_of(rows: tuple[BaselineRow, ...]) -> list[str]:
    return sorted(row.choice.shapes for row in rows if row.choice is not None)


def test_a_padded_result_takes_every_length(text: Result, text_model: nn.Module) -> None:
    choice = text.plan.choice
    assert choice.shapes == "padded"
    baseline = text.record.prices.baseline.choice  # with the same shapes
    assert baseline is not None
    assert replace(choice, options=baseline.options) == baseline
    assert any(f"padded to {choice.buckets[0].describe()}" in note for note in text.record.notes)
    runner: Any = text.model
    assert isinstance(runner.executable, Routed)
    taken = set()
    for length in (2, 5, 7, 9, 11, 20, 31):
        inputs = sentence(3, length, seed=7)
        taken.add(runner.executable.route({"length_1": length}))
        found, wanted = text.model(**inputs), text.module(**inputs)
        assert found.last_hidden_state.shape == (3, length, 32)
        assert error_of(found.values(), wanted.values()) <= ROUNDED
        with torch.no_grad():
            assert error_of(found.values(), text_model(**inputs).values()) <= ROUNDED
    assert taken >= {-1, 0}  # a bucket, and what is longer than all
    assert text.verdict.largest_difference <= ROUNDED
    with pytest.raises(DataError, match="found size 33"):
        text.model(**sentence(1, 33, seed=7))


PROGRAM = textwrap.dedent(
    """
    import sys
    sys.modules["torch"] = None
    import numpy as np
    import tersor
    from tersor.graph.routed import Routed
    runner = tersor.load(sys.argv[1])
    assert isinstance(runner.executable, Routed)
    given = dict(np.load(sys.argv[2]))
    for length in (5, 7, 20, 31):
        pair = {n: given[f"{n} {length}"] for n in ("input_ids", "attention_mask")}
        found = runner(**pair)["pooler_output"]
        assert np.array_equal(found, given[f"wanted {length}"]), length
    """
)


def test_a_saved_one_runs_without_torch(text: Result, tmp_path: Path) -> None:
    path, arrays = tmp_path / "text.tersor", {}
    text.save(path)
    for length in (5, 7, 20, 31):
        inputs = {name: t.numpy() for name, t in sentence(3, length, seed=8).items()}
        arrays |= {f"{name} {length}": a for name, a in inputs.items()}
        arrays[f"wanted {length}"] = text.model(**inputs)["pooler_output"]
    np.savez(tmp_path / "given.npz", **arrays)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, tmp_path / "program.py", path, tmp_path / "given.npz"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_file_holds_the_model_once(text: Result, text_model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "text.tersor"
    text.save(path)
    artifact = verify_artifact(path)
    choice = artifact.manifest.choices["openvino"]
    assert choice == text.plan.choice
    assert set(artifact.builds["openvino"]) == {"model.xml", "model.bin", "segments.json"}
    checks = tersor.verify(path, model=text_model).checks
    assert {check.status for check in checks} <= {"pass", "unknown"}
    text.export(tmp_path / "text.xml")  # compared with the graph while it is written
    # Sizes that no writer chose: a clear refusal, not a failure far away.
    (first, *_) = choice.buckets
    other = Bucket(sizes={"width_9": 8}, least={"width_9": 8})
    for bucket in (other, Bucket(sizes={"length_1": 33}, least=first.least)):
        edited = {"openvino": replace(choice, buckets=(bucket,))}
        manifest = replace(artifact.manifest, choices=edited)
        path.write_bytes(artifact_bytes(replace(artifact, manifest=manifest)))
        with pytest.raises(ArtifactError, match=r"width_9|found size 33"):
            tersor.load(path)


@pytest.mark.slow
def test_a_plan_brings_its_shapes(text: Result, text_model: nn.Module, tmp_path: Path) -> None:
    with choosing("open"):
        again = tersor.apply_plan(
            text_model, sentences(), text.plan, cache_dir=tmp_path, progress=False
        )
    assert again.plan.choice == text.plan.choice
    baseline = again.record.prices.baseline.choice
    assert baseline is not None
    assert baseline.shapes == "open"
    assert again.verdict.agreement == pytest.approx(text.verdict.agreement, abs=1e-4)


def test_image_sizes_are_exact_and_never_padded(image_model: nn.Module, tmp_path: Path) -> None:
    progress = Recorded()
    settings = Settings(cache_dir=tmp_path, backend="openvino", progress=progress)
    session = open_session(image_model, pictures(), settings)
    with choosing("exact"):
        rows, best = baselines(session)
    choice = rows[best].choice
    assert choice is not None
    assert choice.shapes == "exact"
    assert {b.describe() for b in choice.buckets} == {"24x40", "32x32", "40x24"}
    assert choice.buckets[0].describe() == "24x40"  # the most frequent first
    refused = [note for note in progress.notes if "shapes=padded is not offered" in note]
    assert len(refused) == 1
    assert "2 sizes vary" in refused[0]
    built = build_for(session, session.graph, choice)
    runner: Any = runner_for(session, built)
    for height, width in (*SIZES, (40, 40), (16, 18)):
        route = runner.executable.route({"height_1": height, "width_1": width})
        assert (route >= 0) == ((height, width) in SIZES)
        x = random(3, 3, height, width, seed=9)
        found = runner(x)
        with torch.no_grad():
            wanted = image_model(x)
        assert found["map"].shape == (3, 32, height - 2, width - 2)
        assert error_of(found.values(), wanted.values()) <= EXACT
    before = len(progress.stages)
    assert baselines(session) == (rows, best)  # what was measured is kept
    assert progress.stages[before:] == []


class Averaged(nn.Module):
    """A mean over all places, real or not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x).relu().mean(1)
        return y


@pytest.mark.parametrize(
    "backend", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)]
)
def test_bench_shows_what_is_on_offer(text_model: nn.Module, tmp_path: Path, backend: str) -> None:
    with choosing("open"):
        rows = tersor.bench(text_model, sentences(), cache_dir=tmp_path, backend=backend)
    assert {"exact", "padded"} <= set(shapes_of(rows))
    named = [row.name for row in rows if row.choice and row.choice.shapes == "exact"]
    assert len(named) == 1
    assert "exact at 9 | " in named[0]
    assert [row.timing.median_ms for row in rows[1:]] == sorted(
        row.timing.median_ms for row in rows[1:]
    )


def test_a_model_that_averages_padding_is_not_padded(tmp_path: Path) -> None:
    progress = Recorded()
    data = tersor.Data([random(2, n, 8, seed=n) for n in LENGTHS * 5], output="values")
    settings = Settings(cache_dir=tmp_path, backend="openvino", progress=progress)
    with choosing("open"):
        rows, best = baselines(open_session(trained(Averaged()), data, settings))
    assert rows[best].choice is not None
    assert rows[best].choice.shapes == "open"
    assert "exact" in shapes_of(rows)
    assert "padded" not in shapes_of(rows)
    refused = "shapes=padded is not offered: padding with zeros changes the outputs"
    assert any(refused in note and f"at most {EXACT:g}" in note for note in progress.notes)


def test_models_of_one_size_pay_nothing(tmp_path: Path) -> None:
    progress = Recorded()
    data = tersor.Data([random(40, 6, 8)], output="values")
    settings = Settings(cache_dir=tmp_path, backend="openvino", progress=progress)
    with choosing("padded"):
        session = open_session(trained(Averaged()), data, settings)
        rows, best = baselines(session)
    assert "shapes" not in progress.stages
    assert not (tmp_path / "shapes").exists()
    assert set(shapes_of(rows)) == {"open"}
    assert rows[best].choice is not None
    assert not isinstance(build_for(session, session.graph, rows[best].choice).executable, Routed)


def test_a_choice_has_to_be_surely_faster() -> None:
    opened = flat_timing(3.0)
    noisy = replace(opened, rounds_ms=(2.0, 4.0, 2.0, 4.0, 2.0, 2.0, 4.0), median_ms=2.0)
    assert shaping.is_faster(flat_timing(2.0), opened)
    assert not shaping.is_faster(opened, opened)
    assert not shaping.is_faster(noisy, opened)
