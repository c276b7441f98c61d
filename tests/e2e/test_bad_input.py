"""Bad input: the message says where, what was found, what was wanted and the way out.

And nothing partial stays, in the cache directory or where a file was to be written.
"""

import errno
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tersor
from tersor.api.result import Result
from tersor.artifact.container import write_container
from tersor.core.errors import (
    ArtifactError,
    BackendError,
    CaptureError,
    ConfigError,
    DataError,
    MetricError,
    SiteNotFoundError,
    StoreError,
    TargetError,
    WeightError,
)
from tersor.core.store import Store, write_atomic
from tersor.core.target import as_target
from tests.e2e.helpers import Finished, Recorded, partial_files, records, warm_copy

ANY = tersor.Target(drop_points=1)


@pytest.fixture
def refuse(tmp_path: Path, tiny: nn.Module, tiny_data: tersor.Data) -> Callable[..., None]:
    """``compress`` must raise that error with all these words, before any long stage."""

    def check(
        error: type[Exception], *words: str, model: Any = tiny, data: Any = tiny_data, **rest: Any
    ) -> None:
        options = {"target": ANY, "cache_dir": tmp_path / "cache", "progress": Recorded(), **rest}
        with pytest.raises(error) as found:
            tersor.compress(model, data, **options)
        missing = [word for word in words if word not in str(found.value)]
        assert not missing, f"{missing} not in: {found.value}"
        assert records(tmp_path) == {}
        assert partial_files(tmp_path) == []
        assert not {"calibrate", "price"} & set(options["progress"].stages)

    return check


# --- data


@pytest.mark.parametrize("data", [[], iter(()), torch.zeros(0, 28), [torch.zeros(0, 28)]])
def test_empty_data(refuse: Any, data: Any) -> None:
    refuse(DataError, "data: found no samples", "wanted a few dozen", "used up", data=data)


def test_an_empty_part(refuse: Any) -> None:
    x = torch.zeros(4, 28)
    data = tersor.Data(calibration=[x], search=[], test=[x])
    refuse(DataError, "search: found no samples", "wanted a few dozen", data=data)


def test_one_sample(refuse: Any) -> None:
    refuse(
        DataError, "found 1 sample", "at least 3", "calibration, search, test", "a few dozen",
        data=[torch.zeros(1, 28)],
    )  # fmt: skip


def test_a_labelled_loader_without_to_inputs(refuse: Any, images: dict[str, Tensor]) -> None:
    rows = torch.utils.data.TensorDataset(images["train"][:64, 0, 0], images["train_labels"][:64])
    loader = torch.utils.data.DataLoader(rows, batch_size=16)
    refuse(
        DataError, "2 positional input(s)", "Tiny.forward", "to_inputs=lambda batch: batch[0]",
        data=loader,
    )  # fmt: skip


@pytest.mark.parametrize("data", ["a text", 3, None])
def test_data_that_is_no_iterable(refuse: Any, data: Any) -> None:
    refuse(DataError, "data: found", type(data).__name__, "wanted an iterable", data=data)


def test_items_without_tensors(refuse: Any) -> None:
    refuse(DataError, "data, item 0", "found object", "wanted a tensor", data=[object()] * 9)


def test_integers_into_a_convolution(refuse: Any) -> None:
    model = nn.Conv2d(1, 2, 3).eval()
    refuse(
        DataError, "int64(2, 1, 8, 8)", "a float model needs float inputs",
        model=model, data=[torch.zeros(30, 1, 8, 8, dtype=torch.int64)],
    )  # fmt: skip


def test_another_shape(refuse: Any) -> None:
    refuse(DataError, "float32(2, 27)", "wanted inputs that the model", data=[torch.ones(9, 27)])


def test_shapes_that_differ(refuse: Any) -> None:
    refuse(
        DataError, "input 0 comes in 2 shapes", "(27,)", "(28,)", "pad or crop",
        data=[torch.ones(9, 28), torch.ones(9, 27)],
    )  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite(refuse: Any, value: float) -> None:
    bad = torch.zeros(8, 28)
    bad[5, 3] = value
    refuse(
        DataError, "data, item 1, [0]: sample 5 holds NaN or infinity", "wanted finite", "remove",
        data=[torch.zeros(30, 28), bad],
    )  # fmt: skip


def test_double_arrays_are_cast(tiny: nn.Module, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    data = [generator.standard_normal((30, 28)) for _ in range(3)]
    assert data[0].dtype == np.float64
    rows = tersor.bench(tiny, tersor.Data(data, output="values"), cache_dir=tmp_path)
    assert len(rows) >= 2


# --- model


def test_weights_that_are_not_finite(refuse: Any, tiny: Any) -> None:
    with torch.no_grad():
        tiny.middle.weight[1, 2] = float("nan")
    refuse(
        WeightError, "middle.weight: 1 of 2048 values are NaN or infinite", "wanted finite",
        "load a sound checkpoint", model=tiny,
    )  # fmt: skip


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(28, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.layer(x)
        return self.layer(-x)


def test_control_flow_that_depends_on_data(refuse: Any) -> None:
    refuse(
        CaptureError, "Branches can't be exported", "control flow depends on the values of tensors",
        "if x.sum() > 0", "test_bad_input.py", "torch.where", model=Branches().eval(),
    )  # fmt: skip


def test_a_model_in_double_precision(refuse: Any, tiny: nn.Module) -> None:
    wanted = "wanted float32, float16 or bfloat16"
    refuse(WeightError, "float64", wanted, "model.float()", model=tiny.double())


@pytest.mark.parametrize("model", ["model.onnx", lambda x: x])
def test_no_module(refuse: Any, model: Any) -> None:
    refuse(CaptureError, "nn.Module", model=model)


# --- target


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({}, ("the target is empty", "speedup")),
        ("", ("the target is empty", "speedup")),
        ({"speed": 2}, ("unknown keys ['speed']", "speedup")),
        ({"speedup": 2, "latency_ms": 1}, ("contradicts itself", "speedup=2", "keep one")),
        ("2x, 3x", ("contradicts itself", "keep one")),
        ({"speedup": 0.5}, ("speedup=0.5", "at least 1")),
        ({"drop_points": -1}, ("drop_points=-1", "0 to 100")),
        ({"min_agreement": 99}, ("min_agreement=99", "fraction from 0 to 1")),
        ("2 parsecs", ("2 parsecs",)),
    ],
)
def test_targets_that_are_no_targets(refuse: Any, target: Any, words: tuple[str, ...]) -> None:
    refuse(TargetError, *words, target=target)


def test_a_target_of_another_type() -> None:
    with pytest.raises(ConfigError, match=r"found float, wanted tersor\.Target\(.*'2x'"):
        as_target(2.0)


@pytest.mark.parametrize(
    ("target", "binding"),
    [
        pytest.param({"speedup": 50}, "latency", marks=pytest.mark.slow),
        ({"size_ratio": 90}, "size"),
    ],
)
def test_a_target_that_no_plan_meets_gives_the_best_point(
    again: Callable[..., Result], tmp_path: Path, target: Any, binding: str
) -> None:
    result = again(target)
    verdict = result.verdict
    assert verdict.status == "fail"
    assert binding in verdict.binding
    assert [c.status for c in verdict.checks] == ["fail"]
    assert len(result.pareto) >= 2
    result.save(tmp_path / "best.tersor")  # it is a result like any other
    assert tersor.read_report(tmp_path / "best.tersor").verdict.binding == verdict.binding
    facts = result.explain("f1")
    assert facts["level"] == result.plan.assignment["f1"]


# --- options


@pytest.mark.parametrize("batch", [0, -1, True])
def test_batch(refuse: Any, batch: Any) -> None:
    refuse(ConfigError, f"batch: found {batch!r}", "at least 1", batch=batch)


def test_seed(refuse: Any) -> None:
    refuse(ConfigError, "seed: found -1", "from 0 to", seed=-1)
    refuse(ConfigError, f"seed: found {2**70}", "from 0 to", seed=2**70)


def test_no_such_backend(refuse: Any) -> None:
    refuse(ConfigError, "'nope'", "openvino", backend="nope")


def test_no_such_method(refuse: Any) -> None:
    refuse(ConfigError, "'magic'", "quantize", methods=("magic",))


def test_a_device_that_no_backend_runs_on(refuse: Any) -> None:
    refuse(BackendError, "'cuda'", "openvino: it runs on cpu only", "doctor", device="cuda")


def test_a_pattern_without_match(refuse: Any) -> None:
    refuse(SiteNotFoundError, "keep='lost*'", "first, middle, last", keep=("lost*",))


def test_keep_as_one_text(refuse: Any) -> None:
    refuse(ConfigError, "keep: found the text 'last'", "a tuple", keep="last")


# --- metric


def _raises(_: object) -> float:
    raise ZeroDivisionError("no samples")


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (_raises, ("metric raised ZeroDivisionError: no samples", "takes predict", "number")),
        (lambda _: float("nan"), ("metric returned nan", "wanted a finite number")),
        (lambda _: 94.7, ("metric returned 94.7", "from 0 to 1", "tersor.Metric", "points=")),
        (lambda _: None, ("metric returned None (NoneType)", "wanted one number")),
        (lambda _: "0.93", ("metric returned '0.93' (str)", "wanted one number")),
        (
            lambda _: np.array([0.9, 0.8]),
            ("metric returned array([0.9, 0.8]) (ndarray)", "without dimensions"),
        ),
        (lambda predict: predict("no tensor"), ("metric raised", "takes predict")),
    ],
)
def test_metrics_that_are_no_metrics(refuse: Any, metric: Any, words: tuple[str, ...]) -> None:
    """Found on the original, before any long stage."""
    refuse(MetricError, *words, metric=metric)


def test_a_metric_that_is_not_repeatable(refuse: Any) -> None:
    values = iter([0.91, 0.94])
    refuse(
        MetricError,
        *("metric returned 0.91 and then 0.94 for the same model", "a seed that it sets itself"),
        metric=lambda _: next(values),
    )


def test_a_metric_that_is_not_callable(refuse: Any) -> None:
    refuse(ConfigError, "metric: found float", "callable", "tersor.Metric", metric=0.9)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (_raises, ("test_metric raised ZeroDivisionError",)),
        (lambda _: 94.7, ("test_metric returned 94.7", "from 0 to 1")),
    ],
)
def test_a_bad_test_metric_loses_no_finished_stage(
    again: Callable[..., Result], lenet_run: Finished, metric: Any, words: tuple[str, ...],
    tmp_path: Path,
) -> None:  # fmt: skip
    before = records(tmp_path / "warm")
    with pytest.raises(MetricError) as found:
        again(metric=lenet_run.metric, test_metric=metric)
    assert all(word in str(found.value) for word in words)
    now = records(tmp_path / "warm")
    assert before.items() <= now.items()
    assert partial_files(tmp_path / "warm") == []


# --- the cache directory


def test_a_cache_that_is_a_file(refuse: Any, tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("mine", encoding="utf-8")
    refuse(
        StoreError, f"cache directory {place}", "cannot write", "pass cache_dir=", "writable",
        cache_dir=place,
    )  # fmt: skip
    assert place.read_text(encoding="utf-8") == "mine"


def test_a_cache_that_can_not_be_written(
    refuse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root, no folder is read-only: the system's answer is put in its place."""

    def denied(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tersor.core.store.tempfile.mkdtemp", denied)
    refuse(StoreError, "Read-only file system", "pass cache_dir=", cache_dir=tmp_path / "cache")


def _full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_cache_that_is_full(
    tiny: nn.Module, tiny_data: tersor.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the first stage is kept: nothing partial, and a retry goes on."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("tersor.core.store.save", _full)
    with pytest.raises(StoreError) as found:
        tersor.compress(tiny, tiny_data, target=ANY, cache_dir=cache, progress=False)
    text = str(found.value)
    assert str(cache) in text
    assert "stage calibration" in text
    assert "No space left on device" in text
    assert "free some room or pass another cache_dir=" in text
    assert records(cache) == {}
    assert partial_files(cache) == []
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.put("plan", "key", {"a": 1}, {"x": np.ones(3)})
    before = records(tmp_path)
    monkeypatch.setattr("tersor.core.store.save", _full)
    with pytest.raises(StoreError, match="No space left"):
        store.put("plan", "key", {"a": 2}, {"x": np.zeros(3)})
    assert records(tmp_path) == before
    assert store.arrays("plan", "key")["x"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("what", ["save", "report", "plan", "xml", "pt2", "onnx"])
def test_a_full_disk_leaves_no_partial_file(
    lenet_run: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    result = lenet_run.result
    actions: dict[str, tuple[str, Callable[[Path], None]]] = {
        "save": ("m.tersor", result.save),
        "report": ("r.json", result.report),
        "plan": ("p.json", result.plan.save),
        "xml": ("m.xml", result.export),
        "pt2": ("m.pt2", result.export),
        "onnx": ("m.onnx", result.export),
    }
    name, action = actions[what]
    path = tmp_path / name
    path.write_text("what was there", encoding="utf-8")
    monkeypatch.setattr("tersor.core.store.os.fsync", _full)
    with pytest.raises(StoreError) as found:
        action(path)
    assert "cannot write (No space left on device)" in str(found.value)
    assert "has room" in str(found.value)
    assert str(tmp_path) in str(found.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert path.read_text(encoding="utf-8") == "what was there"


def test_a_file_in_a_folder_that_is_not_there(lenet_run: Finished, tmp_path: Path) -> None:
    path = tmp_path / "no" / "such" / "model.tersor"
    with pytest.raises(StoreError, match=r"model\.tersor: cannot write \(No such file or dir"):
        lenet_run.result.save(path)
    with pytest.raises(StoreError, match="cannot write"):
        write_atomic(path, b"")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["propose", "price", "plan", "transform"])
def test_a_damaged_record_is_made_again(lenet_run: Finished, tmp_path: Path, stage: str) -> None:
    """A store that was cut off by the system, not by us: the stage is run again."""
    store = Store(warm_copy(lenet_run, tmp_path))
    path = min((store.root / stage).glob("*/record.json"))  # other tests resolve this result
    path.write_bytes(path.read_bytes()[:-20])
    from tersor.core.records import Plan  # any record: the damage is seen before the class

    assert store.get(Plan, stage, path.parent.name) is None
    assert not path.exists()


# --- artifacts


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip_a_weight(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("weights.safetensors")
    data = bytearray(path.read_bytes())
    data[info.header_offset + info.compress_size // 2] ^= 1
    path.write_bytes(data)


def _edit_the_manifest(path: Path) -> None:
    """Written anew, whole and well-formed, with another hash for the weights."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(entries["manifest.json"])
    manifest["sha256"]["weights.safetensors"] = "0" * 64
    entries["manifest.json"] = json.dumps(manifest).encode()
    path.write_bytes(write_container(entries))


@pytest.mark.parametrize("damage", [_cut, _half, _empty, _flip_a_weight, _edit_the_manifest])
@pytest.mark.parametrize("use", ["load", "verify", "export"])
def test_damaged_artifacts_are_refused(
    lenet_file: Path, tmp_path: Path, damage: Callable[[Path], None], use: str
) -> None:
    path = tmp_path / "model.tersor"
    path.write_bytes(lenet_file.read_bytes())
    damage(path)
    uses: dict[str, Callable[[], object]] = {
        "load": lambda: tersor.load(path),
        "verify": lambda: tersor.verify(path),
        "export": lambda: tersor.export(path, tmp_path / "out.pt2"),
    }
    with pytest.raises(ArtifactError) as found:
        uses[use]()
    assert str(path) in str(found.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model.tersor"]


def test_a_file_that_is_no_artifact(tmp_path: Path) -> None:
    path = tmp_path / "model.tersor"
    path.write_text("hello", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"model\.tersor"):
        tersor.load(path)
    with pytest.raises(ArtifactError, match=r"none\.tersor"):
        tersor.load(tmp_path / "none.tersor")


@pytest.fixture(scope="module")
def runner(lenet_file: Path) -> Any:
    return tersor.load(lenet_file)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x.long(), ("input 'x'", "found int64", "wanted float32", "convert")),
        (lambda x: x[:, :, :14], ("input 'x'", "found shape (2, 1, 14, 28)", "(batch, 1, 28, 28)")),
        (lambda x: x[0], ("input 'x'", "found shape (1, 28, 28)", "resize or pad")),
        (lambda x: x.numpy().astype(np.int32), ("found int32", "wanted float32")),
    ],
)
def test_calls_that_do_not_fit_the_artifact(
    runner: Any, images: dict[str, Tensor], make: Callable[[Tensor], Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(DataError) as found:
        runner(make(images["test"][:2]))
    missing = [word for word in words if word not in str(found.value)]
    assert not missing, str(found.value)


def test_arguments_that_do_not_fit_the_artifact(runner: Any, images: dict[str, Tensor]) -> None:
    with pytest.raises(DataError, match="x"):
        runner()
    with pytest.raises(DataError, match="z"):
        runner(images["test"][:1], z=images["test"][:1])


def test_guards_of_a_loaded_artifact(lenet_file: Path, images: dict[str, Tensor]) -> None:
    x = images["test"][:2].clone()
    guarded = tersor.load(lenet_file, guards=tersor.Guards())
    assert torch.equal(guarded(x), tersor.load(lenet_file)(x))
    x[1, 0, 3, 3] = float("nan")
    with pytest.raises(tersor.TersorError, match="input 'x': found 1 NaN"):
        guarded(x)
    with pytest.raises(tersor.TersorError, match="calibrated for: found 1000, wanted"):
        guarded(torch.full((1, 1, 28, 28), 1000.0))
    clamping = tersor.load(lenet_file, guards=tersor.Guards(policy="clamp"))
    assert bool(torch.isfinite(clamping(x)).all())
    assert (guarded.stats()["rejected"], clamping.stats()["clamped"]) == (2, 1)


def test_nan_is_nan_without_guards(
    lenet_file: Path, lenet_run: Finished, images: dict[str, Tensor]
) -> None:
    """The build has 8-bit layers, which make numbers of it."""
    batch = images["test"][:5].clone()
    batch[3, 0, 9, 9] = float("nan")
    for model in (tersor.load(lenet_file), lenet_run.result.model):
        found = model(batch)
        assert torch.isnan(found[3]).all()
        assert torch.isfinite(found[[0, 1, 2, 4]]).all()


def test_a_device_the_artifact_was_not_built_for(lenet_file: Path) -> None:
    with pytest.raises(BackendError, match="no build in it runs on cuda: openvino was built for c"):
        tersor.load(lenet_file, device="cuda")


def test_a_generator_is_read_once(tiny: nn.Module, tmp_path: Path) -> None:
    """A used-up iterator says so; a fresh one works."""

    def batches() -> Iterator[Tensor]:
        yield from torch.zeros(4, 20, 28)

    used = batches()
    list(used)
    with pytest.raises(DataError, match="already used up"):
        tersor.bench(tiny, used, cache_dir=tmp_path)
