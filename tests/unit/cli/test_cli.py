"""The command line against a faked ``tersor.api``: words, streams, files and exit codes."""

import inspect
import io
import json
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from tersor import api
from tersor.analyse.inspection import Branch, Inspection
from tersor.analyse.roofline import Ceilings, Profile, ProfileRow
from tersor.api.comparing import Comparison
from tersor.cli import main as entry
from tersor.cli.exits import ExitCode
from tersor.cli.main import app
from tersor.cli.options import cache_directory
from tersor.cli.output import PIPE_WIDTH, Output
from tersor.cli.progress import LINE_SECONDS, Bars, Lines, make_progress
from tersor.cli.sources import as_call, first_inputs, load_arrays, load_object, samples
from tersor.core.data import Data
from tersor.core.errors import (
    ArtifactError,
    BackendError,
    ConfigError,
    DataError,
    MissingDependencyError,
    StoreError,
    TargetError,
    TersorError,
)
from tersor.core.jsonable import from_json
from tersor.core.records import Check, Plan, Signature, Structure, Timing
from tersor.report.record import Report
from tersor.verify.divergence import BuildDivergence, Point

SAMPLE = Path(__file__).parents[1] / "report" / "sample.json"
SOURCE = """
import torch
from tersor import Data

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)

OBJECT = Net()
NUMBER = 3

def broken():
    raise RuntimeError("no weights here")

def inputs():
    return [torch.zeros(1, 3), torch.ones(1, 3)]

def wrapped():
    return Data([(torch.zeros(1, 3), "label")], to_inputs=lambda item: item[0])

def metric(predict):
    return 1.0
"""


@pytest.fixture
def record() -> Report:
    return from_json(Report, json.loads(SAMPLE.read_text(encoding="utf-8")))


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "source.py"
    path.write_text(SOURCE, encoding="utf-8")
    return str(path)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    """Put a function in the place of one of the api's; calls must fit the real signature."""

    def put(name: str, function: Callable[..., Any]) -> None:
        real = inspect.signature(getattr(api, name))

        def checked(*args: Any, **kwargs: Any) -> Any:
            real.bind(*args, **kwargs)
            return function(*args, **kwargs)

        monkeypatch.setattr(api, name, checked)

    return put


@dataclass(frozen=True)
class Checked:
    checks: tuple[Check, ...]


class FakeResult:
    def __init__(self, record: Report, status: str = "pass") -> None:
        self.record = record
        self.plan = record.plan
        self.verdict = SimpleNamespace(status=status)

    def save(self, path: Path) -> None:
        Path(path).write_bytes(b"artifact")


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def json_of(result: Result) -> Any:
    return json.loads(result.stdout)


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*_: object, **__: object) -> None:
        raise error

    return function


@pytest.mark.parametrize(("status", "code"), [("pass", 0), ("fail", 1), ("unknown", 1)])
def test_compress_says_whether_the_target_is_met(
    fake: Any, record: Report, source: str, tmp_path: Path, status: str, code: int
) -> None:
    fake("compress", lambda *_, **__: FakeResult(record, status))
    out = tmp_path / "model.tersor"
    result = call("compress", f"{source}:Net", f"{source}:inputs", "--target", "2x", "--out", out)
    assert result.exit_code == code
    assert out.read_bytes() == b"artifact"  # the best point is saved either way


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("wrong"), ExitCode.WRONG_USE),
        (DataError("wrong"), ExitCode.WRONG_USE),
        (MissingDependencyError("wrong"), ExitCode.ENVIRONMENT),
        (BackendError("wrong"), ExitCode.ENVIRONMENT),
        (StoreError("wrong"), ExitCode.ENVIRONMENT),
        (ArtifactError("wrong"), ExitCode.VERIFICATION),
    ],
)
def test_each_cause_has_its_code_and_no_traceback(
    fake: Any, error: TersorError, code: ExitCode
) -> None:
    fake("read_report", raising(error))
    result = call("report", "a.tersor")
    assert result.exit_code == code
    assert result.stderr == "tersor: wrong\n"
    assert result.stdout == ""


def test_an_error_is_json_too_if_wanted(fake: Any) -> None:
    fake("read_report", raising(ArtifactError("cut short")))
    result = call("report", "a.tersor", "--json")
    assert json_of(result) == {
        "error": {"type": "ArtifactError", "message": "cut short", "exit_code": 4}
    }


@pytest.mark.parametrize("words", [["--debug", "report", "a"], ["report", "a", "--debug"]])
def test_debug_shows_the_traceback_from_any_place(fake: Any, words: list[str]) -> None:
    fake("read_report", raising(ArtifactError("cut short")))
    result = call(*words)
    assert result.exit_code == ExitCode.VERIFICATION
    assert "Traceback" in result.stderr


def test_an_interrupt_says_how_to_go_on(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("read_report", raising(KeyboardInterrupt()))
    words = ["report", "my model.tersor"]
    monkeypatch.setattr(sys, "argv", ["tersor", *words])
    result = call(*words)
    assert result.exit_code == ExitCode.INTERRUPTED
    assert "finished stages are kept" in result.stderr
    assert shlex.join(["tersor", *words]) in result.stderr


@pytest.mark.filterwarnings("default:inferred")
def test_a_warning_is_one_line_without_source(fake: Any, record: Report) -> None:
    def read_report(_: Any) -> Report:
        warnings.warn("inferred as logits", stacklevel=2)
        return record

    fake("read_report", read_report)
    shown = warnings.showwarning
    assert call("report", "a.tersor", "--json").stderr.startswith("warning: inferred as logits\n")
    assert warnings.showwarning is shown


def test_a_defect_is_not_mistaken_for_a_missed_target(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake("read_report", raising(ZeroDivisionError("a bug")))
    monkeypatch.setattr(sys, "argv", ["tersor", "report", "a.tersor"])
    with pytest.raises(SystemExit) as left:
        entry.main()
    assert left.value.code == ExitCode.CRASH
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["report"],
        ["report", "a.tersor", "--nonsense"],
        ["compress", "m.py:f", "d.npz", "--target", "2x"],
        ["compress", "m.py:f", "d.npz", "--target", "2x", "--out", "o", "--batch", "0"],
    ],
)
def test_usage_errors_leave_with_two(words: list[str]) -> None:
    assert call(*words).exit_code == ExitCode.WRONG_USE


def test_every_command_knows_json() -> None:
    listed = call("--help").stdout
    names = [c.callback.__name__ for c in app.registered_commands if c.callback]
    assert len(names) == 12
    for name in names:
        assert name in listed
        assert "--json" in call(name, "--help").stdout, name


def test_version() -> None:
    from tersor._version import __version__

    assert call("--version").stdout == f"tersor {__version__}\n"


def test_the_package_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tersor", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("tersor", run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("tersor ")


def test_compress_hands_over_every_option(
    fake: Any, record: Report, source: str, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def compress(model: Any, data: Any, **options: Any) -> FakeResult:
        seen.update(options, model=model, data=data)
        return FakeResult(record)

    fake("compress", compress)
    plan = tmp_path / "plan.json"
    result = call(
        *("compress", f"{source}:Net", f"{source}:inputs", "--target", "2x, 0.5 pt"),
        *("--out", tmp_path / "m.tersor", "--plan-out", plan, "--device", "cpu"),
        *("--backend", "openvino", "--batch", 4, "--seed", 9, "--cache-dir", tmp_path / "c"),
        *("--keep", "head.*", "--keep", "stem", "--methods", "quantize"),
        *("--metric", f"{source}:metric", "--test-metric", f"{source}:metric"),
    )
    assert result.exit_code == 0
    assert type(seen["model"]).__name__ == "Net"
    assert len(seen["data"]) == 2
    assert seen["target"].budgets() == {"speedup": 2.0, "drop_points": 0.5}
    assert (seen["device"], seen["backend"], seen["batch"], seen["seed"]) == (
        *("cpu", "openvino", 4, 9),
    )
    assert (seen["keep"], seen["methods"]) == (("head.*", "stem"), ("quantize",))
    assert seen["cache_dir"] == tmp_path / "c"
    assert seen["metric"](None) == seen["test_metric"](None) == 1.0
    assert from_json(Plan, json.loads(plan.read_text(encoding="utf-8"))) == record.plan


def test_compress_reports_in_json_on_stdout_and_words_on_stderr(
    fake: Any, record: Report, source: str, tmp_path: Path
) -> None:
    def compress(*_: Any, progress: Any, **__: Any) -> FakeResult:
        progress.stage("pricing", 3)
        progress.advance()
        progress.note("a remark")
        return FakeResult(record)

    fake("compress", compress)
    words = ("compress", f"{source}:OBJECT", f"{source}:inputs", "--target", "2x", "--json")
    result = call(*words, "--out", tmp_path / "m.tersor")
    assert from_json(Report, json_of(result)["record"]) == record
    for text in ("pricing (3 steps)", "a remark", "target met", "m.tersor"):
        assert text in result.stderr


@pytest.mark.parametrize("target", ["2", "2 parsecs", "2x, 3x", ""])
def test_a_bad_target_is_refused_before_any_work(fake: Any, tmp_path: Path, target: str) -> None:
    fake("compress", raising(AssertionError("must not be reached")))
    words = ("compress", "missing.py:f", "missing.npz", "--target", target)
    result = call(*words, "--out", tmp_path / "m", "--json")
    assert result.exit_code == ExitCode.WRONG_USE
    assert json_of(result)["error"]["type"] == TargetError.__name__


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    words = ("compress", "missing.py:f", "missing.npz", "--target", "2x", "--out")
    absent = call(*words, tmp_path / "none" / "m.tersor")
    assert absent.exit_code == ExitCode.WRONG_USE
    assert f"the folder {tmp_path / 'none'} does not exist" in absent.stderr
    assert "is a folder" in call(*words, tmp_path).stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NUMBER", "found int, wanted a torch.nn.Module"),
        ("inputs", "found list, wanted a torch.nn.Module"),
        ("broken", "raised RuntimeError: no weights here"),
        ("absent", "has no 'absent'; public names there:"),
        ("", "wanted package.module:name"),
    ],
)
def test_a_model_that_is_none(source: str, name: str, message: str) -> None:
    result = call("bench", f"{source}:{name}", f"{source}:inputs")
    assert result.exit_code == ExitCode.WRONG_USE
    assert message in result.stderr


def test_a_file_that_fails_to_import_is_named_and_tried_afresh(tmp_path: Path) -> None:
    path = tmp_path / "half.py"
    path.write_text("import a_module_that_is_not_there\n", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"half\.py raised ModuleNotFoundError"):
            load_object(f"{path}:name")
    with pytest.raises(ConfigError, match="no such file"):
        load_object(f"{tmp_path / 'absent.py'}:name")


def test_objects_come_from_modules_and_attributes_too() -> None:
    assert load_object("json.decoder:JSONDecoder.decode") is json.JSONDecoder.decode
    with pytest.raises(ConfigError, match="raised ModuleNotFoundError"):
        load_object("no_such_module:name")


def test_named_arrays_are_keyword_inputs_one_sample_an_item(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    ids = np.arange(6).reshape(3, 2)
    np.savez(path, ids=ids, mask=np.ones((3, 2), np.float32))
    items = samples(load_arrays(path), str(path))
    assert len(items) == 3
    assert set(items[1]) == {"ids", "mask"}
    assert items[1]["ids"].tolist() == ids[1:2].tolist()


def test_unnamed_arrays_are_positional_inputs() -> None:
    one = samples({"arr_0": np.zeros((2, 3))}, "x")
    assert tuple(one[0].shape) == (1, 3)
    two = samples({"arr_1": np.ones((2, 1)), "arr_0": np.zeros((2, 3))}, "x")
    assert [tuple(t.shape) for t in two[0]] == [(1, 3), (1, 1)]
    assert as_call({"arr_0": 1, "other": 2}) == ((), {"arr_0": 1, "other": 2})


def test_safetensors_are_read_as_well(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "data.safetensors"
    save_file({"x": np.eye(3, dtype=np.float32)}, path)
    assert np.array_equal(load_arrays(path)["x"], np.eye(3))
    assert samples(load_arrays(path), "x")[2]["x"].tolist() == [[0.0, 0.0, 1.0]]


def test_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="of plain numbers"):
        load_arrays(path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_damaged_file_of_arrays_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(DataError, match=rf"data\{suffix}: .*; wanted"):
        load_arrays(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(2), "b": np.zeros(3)}, r"must be equal; found \{'a': 2, 'b': 3\}"),
        ({"a": np.float32(1.0)}, "'a' is a scalar"),
        ({"a": np.array(["x"])}, "can't convert"),
    ],
)
def test_arrays_that_are_no_samples(arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        samples({k: np.asarray(v) for k, v in arrays.items()}, "x.npz")


@pytest.mark.parametrize(
    ("name", "message"),
    [("data.txt", "wanted a file of arrays"), ("absent.npz", "no such file")],
)
def test_a_path_that_is_no_file_of_arrays(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_arrays(tmp_path / name)


def test_an_empty_file_of_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz")
    with pytest.raises(DataError, match="holds no array"):
        load_arrays(tmp_path / "none.npz")


def test_the_example_is_the_first_item_as_inputs() -> None:
    assert first_inputs([5, 6]) == 5
    assert first_inputs(Data([(5, "label")], to_inputs=lambda item: item[0])) == 5
    assert first_inputs(Data(calibration=[7], search=[8], test=[9])) == 7
    with pytest.raises(DataError, match="empty"):
        first_inputs([])


def test_cache_directory_option_environment_default(
    fake: Any, record: Report, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def compress(*_: Any, cache_dir: Path, **__: Any) -> FakeResult:
        seen.append(cache_dir)
        return FakeResult(record)

    fake("compress", compress)
    words = ("compress", f"{source}:Net", f"{source}:inputs", "--target", "2x")
    monkeypatch.setenv("TERSOR_CACHE_DIR", str(tmp_path / "env"))
    call(*words, "--out", tmp_path / "m")
    call(*words, "--out", tmp_path / "m", "--cache-dir", tmp_path / "option")
    assert seen == [tmp_path / "env", tmp_path / "option"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory(None) == tmp_path / "xdg" / "tersor"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory(None) == tmp_path / ".cache" / "tersor"


def test_doctor_really_runs() -> None:
    result = call("doctor", "--json")
    found = json_of(result)
    assert result.exit_code == (0 if found["run_on"] else ExitCode.ENVIRONMENT)
    assert {f["name"] for f in found["findings"]} >= {"processor", "numpy", "torch", "openvino"}
    assert "compress models:" in result.stderr


def test_doctor_without_a_backend_is_an_environment_error(fake: Any) -> None:
    from tersor.analyse.doctor import Probes, diagnose
    from tersor.core.machine import describe_machine

    fake("doctor", lambda: diagnose([], describe_machine(), probes=Probes(packages={})))
    result = call("doctor")
    assert result.exit_code == ExitCode.ENVIRONMENT
    assert "pip install 'tersor[compress]' (torch>=2.11)" in result.stdout
    assert "run artifacts: no" in result.stdout


def test_bench_lists_the_uncompressed_builds(fake: Any, record: Report, source: str) -> None:
    seen: dict[str, Any] = {}

    def bench(_: Any, __: Any, **options: Any) -> Any:
        seen.update(options)
        return record.prices.baselines

    fake("bench", bench)
    words = ("bench", f"{source}:Net", f"{source}:wrapped", "--batch", 3, "--backend", "openvino")
    assert "openvino f32" in call(*words).stdout
    rows = json_of(call(*words, "--json"))
    assert [row["name"] for row in rows] == ["eager", "openvino f32"]
    assert seen == {"device": "cpu", "backend": "openvino", "batch": 3}


def test_profile_shows_the_longest_op_first(fake: Any, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    rows = tuple(
        ProfileRow(
            node=n, layer=n, kind="linear", format="int8", ms=ms, share=ms / 3, macs=10**6,
            bytes=10**5, bound="compute", of_ceiling=0.5,
        )
        for n, ms in (("short", 1.0), ("long", 2.0))
    )  # fmt: skip
    found = Profile(
        name="net.tersor",
        build="openvino f32",
        call=Timing(median_ms=3.5, low_ms=3.0, high_ms=4.0, rounds_ms=(3.5,), runs=1),
        rows=rows,
        outside_ms=0.5,
        floor_ms=1.5,
        ceilings=Ceilings(macs_per_s={"int8": 2e10}, bytes_per_s=1e10),
        weight_bytes=10**6,
        peak_bytes=None,
    )

    def profile(_: Any, data: Any, **options: Any) -> Any:
        seen.update(options, data=data)
        return found

    fake("profile", profile)
    trace = tmp_path / "trace.json"
    shown = call("profile", "net.tersor", "--no-ceilings", "--trace", trace).stdout
    assert shown.index("long") < shown.index("short")
    assert "0.500 ms" in shown
    assert "int8 20.0 GMAC/s" in shown
    assert json.loads(trace.read_text())["traceEvents"]
    assert seen == {
        "data": None, "device": "cpu", "backend": "auto", "batch": 1, "ceilings": False,
    }  # fmt: skip
    assert json_of(call("profile", "net.tersor", "--json"))["floor_ms"] == 1.5
    assert call("profile", "net.tersor", "--trace", tmp_path / "no" / "t.json").exit_code == 2


@pytest.mark.parametrize("error", [1e-6, 0.5])
def test_compare_says_unequal_by_its_exit_code(fake: Any, source: str, error: float) -> None:
    def compare(one: Any, other: Any, *, inputs: Any, limit: float) -> Any:
        assert one == "a.tersor"
        assert inputs is not None
        first = "linear_3" if error > limit else None
        return Comparison(
            one=str(one),
            other=type(other).__name__,
            limit=limit,
            outputs={"output": error},
            points=(Point(node="linear_3", op="aten.linear.default", error=error, own=error),),
            first=first,
            introduced=first,
            builds=(BuildDivergence(build="openvino f32", error=1e-9, limit=1e-6, first=None),),
        )

    fake("compare", compare)
    ran = call("compare", "a.tersor", f"{source}:Net", f"{source}:inputs")
    assert ran.exit_code == (ExitCode.MET if error < 1e-2 else ExitCode.VERIFICATION)
    assert ("first that differs: linear_3" in ran.stdout) == (error > 1e-2)
    assert "openvino f32 against its graph: 1e-09" in ran.stdout


def test_inspect_of_a_model_runs_the_first_item(fake: Any, record: Report, source: str) -> None:
    seen: list[Any] = []

    def inspect_model(_: Any, example: Any, *, keep: Any, time: bool) -> Any:
        seen.extend((example, keep, time))
        empty = Structure(kind="tuple")
        signature = Signature(inputs=(), outputs=(), args=empty, kwargs=empty, result=empty)
        return Inspection(
            signature=signature,
            sites=record.sites,
            unsupported={"lstm": "no rule"},
            macs=1234,
            size_bytes=2_000_000,
            nodes=7,
            tree=Branch(name="head", path="head", kind="linear"),
        )

    fake("inspect", inspect_model)
    result = call("inspect", f"{source}:Net", f"{source}:wrapped", "--keep", "head*", "--time")
    assert tuple(seen[0].shape) == (1, 3)
    assert seen[1:] == [("head*",), True]
    assert "matched by keep" in result.stdout
    assert "7 nodes, 1,234 MACs per sample at the sites, 2.00 MB" in result.stdout
    assert "not a site: lstm: no rule" in result.stdout


def test_inspect_of_an_artifact_reads_its_sites(fake: Any, record: Report) -> None:
    fake("read_report", lambda _: record)
    names = [site["name"] for site in json_of(call("inspect", "a.tersor", "--json"))["sites"]]
    assert names == ["encoder.0", "encoder.1", "head[0]"]


def test_inspect_of_a_model_without_data_says_what_is_missing() -> None:
    result = call("inspect", "net.py:Net")
    assert result.exit_code == ExitCode.WRONG_USE
    assert "needs DATA" in result.stderr


def test_demo_hands_over_its_options_and_prints_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def run_demo(*, seed: int, cache_dir: Path, quick: bool, console: Console) -> Any:
        seen.update(seed=seed, cache_dir=cache_dir, quick=quick)
        console.print("a table")
        return (Check(name="row", wanted=1.0, found=2.0, status="pass"),)

    compare = SimpleNamespace(run_demo=run_demo)
    monkeypatch.setitem(sys.modules, "tersor.cli.demo.compare", compare)
    words = ("demo", "--quick", "--seed", 3, "--cache-dir", tmp_path)
    assert call(*words).stdout == "a table\n"
    assert seen == {"seed": 3, "cache_dir": tmp_path, "quick": True}
    result = call(*words, "--json")
    assert [row["name"] for row in json_of(result)] == ["row"]
    assert result.stderr == "a table\n"


class FakeRunner:
    def __init__(self, outputs: Any) -> None:
        self.outputs = outputs
        self.calls: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.outputs

    def stats(self) -> dict[str, int]:
        return {"calls": len(self.calls)}


def test_run_writes_its_outputs(fake: Any, tmp_path: Path) -> None:
    nested = {"logits": np.eye(2, dtype=np.float32), "states": (np.zeros(3), None)}
    runner = FakeRunner(nested)
    fake("load", lambda *_, **__: runner)
    np.savez(tmp_path / "in.npz", x=np.ones((2, 4)))
    out = tmp_path / "out.npz"
    result = call("run", "a.tersor", tmp_path / "in.npz", "--out", out, "--json")
    assert result.exit_code == 0
    assert json_of(result) == {
        "outputs": {
            "logits": {"dtype": "float32", "shape": [2, 2]},
            "states.0": {"dtype": "float64", "shape": [3]},
        },
        "stats": {"calls": 1},
    }
    assert list(runner.calls[0][1]) == ["x"]
    with np.load(out) as saved:
        assert np.array_equal(saved["logits"], nested["logits"])


def test_run_shows_a_lone_array_and_refuses_other_outputs(fake: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", np.ones((2, 4)))
    fake("load", lambda *_, **__: FakeRunner(np.zeros((2, 3))))
    assert call("run", "a", tmp_path / "in.npz").stdout == "output: float64 [2, 3]\n"
    fake_outputs = FakeRunner("text")
    fake("load", lambda *_, **__: fake_outputs)
    refused = call("run", "a", tmp_path / "in.npz")
    assert refused.exit_code == ExitCode.WRONG_USE
    assert "a str is no array" in refused.stderr


@pytest.mark.parametrize(("status", "code"), [("pass", 0), ("unknown", 0), ("fail", 4)])
def test_verify_leaves_with_four_when_something_is_unequal(
    fake: Any, source: str, tmp_path: Path, status: Any, code: int
) -> None:
    check = Check(name="graph", wanted=1e-4, found=0.5, status=status, note="entry x")
    seen: dict[str, Any] = {}

    def verify(_: Any, **options: Any) -> Any:
        seen.update(options)
        return Checked(checks=(check,))

    fake("verify", verify)
    np.savez(tmp_path / "in.npz", x=np.ones((2, 4)))
    words = ("verify", "a.tersor", "--model", f"{source}:Net", "--inputs", tmp_path / "in.npz")
    result = call(*words)
    assert result.exit_code == code
    assert result.stdout == f"{status}  graph: found 0.5, wanted 0.0001 (entry x)\n"
    assert type(seen["model"]).__name__ == "Net"
    assert list(seen["inputs"]) == ["x"]


def test_explain_one_site_or_all(fake: Any, record: Report) -> None:
    fake("read_report", lambda _: record)
    one = call("explain", "a.tersor", "encoder.0")
    assert "undo this (back to f32): +1.800 ms, -0.003 error, +3.00 MB" in one.stdout
    assert json_of(call("explain", "a.tersor", "encoder.0", "--json"))["level"] == "int8"
    assert len(json_of(call("explain", "a.tersor", "--json"))) == 3
    missing = call("explain", "a.tersor", "encodr.0")
    assert missing.exit_code == ExitCode.WRONG_USE
    assert "nearest of 3: encoder.0" in missing.stderr


def test_report_shows_all_and_json_reads_back(fake: Any, record: Report) -> None:
    fake("read_report", lambda _: record)
    assert "target met" in call("report", "a.tersor").stdout
    assert from_json(Report, json_of(call("report", "a.tersor", "--json"))["record"]) == record


def test_export_knows_three_endings(fake: Any, tmp_path: Path) -> None:
    def export(_: Any, out: Path) -> None:
        Path(out).write_bytes(b"1234")

    fake("export", export)
    out = tmp_path / "m.onnx"
    assert json_of(call("export", "a.tersor", out, "--json")) == {
        "saved": str(out),
        "size_bytes": 4,
    }
    refused = call("export", "a.tersor", tmp_path / "m.pdf")
    assert refused.exit_code == ExitCode.WRONG_USE
    assert ".xml, .onnx, .pt2" in refused.stderr


def test_plain_progress_says_stages_steps_and_time_left(capsys: Any) -> None:
    now = [0.0]
    lines = Lines(Console(width=100, highlight=False), clock=lambda: now[0])
    lines.stage("pricing", 4)
    now[0] = LINE_SECONDS - 1
    lines.advance()  # too soon for a line
    now[0] = LINE_SECONDS + 2
    lines.advance()
    lines.stage("searching")
    now[0] += LINE_SECONDS
    lines.advance(5)
    lines.note("[a note]")
    lines.close()
    assert capsys.readouterr().out.splitlines() == [
        "[    0.0 s] pricing (4 steps)",
        "[   12.0 s] pricing: 2/4, 12 s left",  # 2 steps in 12 s, 2 to go
        "[   12.0 s] searching",
        "[   22.0 s] searching: 5",
        "[   22.0 s]   [a note]",
    ]


def test_terminals_get_bars_that_end_full(capsys: Any) -> None:
    console = Console(force_terminal=True, width=100, color_system=None)
    bars = make_progress(console)
    assert isinstance(bars, Bars)
    bars.stage("pricing", 4)
    bars.advance(3)
    bars.note("[a note]")
    bars.stage("searching")
    bars.close()
    bars.close()
    assert "[a note]" in capsys.readouterr().out
    console.print(bars._bars.get_renderable())  # not what the drawing thread had time for
    drawn = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in drawn] == ["pricing", "searching"]
    assert "4/4" in drawn[0]
    assert "1/1" in drawn[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("as_json", [True, False])
def test_a_pipe_gets_wide_tables_and_a_terminal_its_own_width(
    monkeypatch: pytest.MonkeyPatch, *, as_json: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "33")
    monkeypatch.setattr(sys, "stderr" if as_json else "stdout", Terminal())
    assert Output(as_json).console().width == 33
    monkeypatch.setattr(sys, "stderr" if as_json else "stdout", io.StringIO())
    assert Output(as_json).console().width == PIPE_WIDTH


def test_pipes_get_lines(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="utf-8") as stream:
        assert isinstance(make_progress(Console(file=stream)), Lines)
