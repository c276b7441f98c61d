"""The command line on a real model: the words, files and exit codes that scripts live by."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner
from typer.testing import Result as Ran

import tersor
from tersor.cli.main import app
from tests.e2e.helpers import (
    N_TEST,
    Finished,
    close_logits,
    kept_all,
    partial_files,
    records,
    start,
    stop_when,
    warm_copy,
)

SOURCE = """
import numpy as np
import tersor
from tests.conftest import DATA, pixels
from tests.data.zoo import load_lenet5

with np.load(DATA / "fashion_mnist_2k.npz") as packed:
    TRAIN, TEST = pixels(packed["train_images"]), pixels(packed["test_images"])
    LABELS = packed["train_labels"]


def model():
    return load_lenet5()


def data():
    return tersor.Data(
        calibration=[TRAIN[:60]], search=[TRAIN[60:100]], test=[TEST[:40]], output="logits"
    )


def accuracy(predict):
    return float((predict(TRAIN[60:100].numpy()).argmax(1) == LABELS[60:100]).mean())


def percent(predict):
    return 100 * accuracy(predict)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "lenet.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


@pytest.fixture
def arrays(tmp_path: Path, images: dict[str, Tensor]) -> Path:
    """Seven images as a file."""
    path = tmp_path / "in.npz"
    np.savez(path, images["test"][:7].numpy())
    return path


def call(*words: object) -> Ran:
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def compress_words(source: Path, folder: Path, target: str) -> tuple[str, ...]:
    return (
        "compress", f"{source}:model", f"{source}:data", "--target", target, "--methods", "quantize",
        "--out", str(folder / "model.tersor"), "--cache-dir", str(folder / "warm"),
        "--backend", "openvino",
    )  # fmt: skip


@pytest.fixture(scope="module")
def compressed(
    source: Path, lenet_run: Finished, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Ran]:
    """The artifact of one ``tersor compress``, and what the command said."""
    folder = tmp_path_factory.mktemp("cli")
    warm_copy(lenet_run, folder)
    words = compress_words(source, folder, "size_ratio=3, 20 pt")
    plan = ("--plan-out", folder / "plan.json", "--metric", f"{source}:accuracy", "--json")
    return folder / "model.tersor", call(*words, *plan)


def test_compress_says_whether_the_target_is_met(compressed: tuple[Path, Ran]) -> None:
    path, ran = compressed
    found = json.loads(ran.stdout)
    assert ran.exit_code == (0 if found["status"] == "pass" else 1)
    assert found["status"] == tersor.read_report(path).verdict.status
    assert f"saved {path}" in ran.stderr
    assert "verify" in ran.stderr  # the stages, where people look beside JSON
    plan = json.loads(path.with_name("plan.json").read_text(encoding="utf-8"))
    assert plan["assignment"] == found["record"]["plan"]["assignment"]
    assert found["record"]["verdict"]["size_bytes"] <= path.stat().st_size * 1.05
    assert found["record"]["verdict"]["test_samples"] == N_TEST


def test_a_target_that_is_not_met_leaves_the_best_point(
    source: Path, lenet_run: Finished, tmp_path: Path
) -> None:
    warm_copy(lenet_run, tmp_path)
    ran = call(*compress_words(source, tmp_path, "size_ratio=90"))
    assert ran.exit_code == 1
    assert "size" in ran.stdout
    assert tersor.read_report(tmp_path / "model.tersor").verdict.status == "fail"


def test_run_gives_what_the_runner_gives(
    compressed: tuple[Path, Ran], arrays: Path, tmp_path: Path, images: dict[str, Tensor]
) -> None:
    path, _ = compressed
    out = tmp_path / "out.npz"
    ran = call("run", path, arrays, "--out", out, "--json")
    assert ran.exit_code == 0
    told = json.loads(ran.stdout)
    assert told["outputs"] == {"output": {"dtype": "float32", "shape": [7, 10]}}
    assert told["stats"]["samples"] == 7
    with np.load(out) as found:
        wanted = tersor.load(path)(images["test"][:7].numpy())
        assert np.array_equal(found["output"], wanted)


def test_verify_against_the_original(
    compressed: tuple[Path, Ran], source: Path, arrays: Path
) -> None:
    path, _ = compressed
    ran = call("verify", path, "--model", f"{source}:model", "--inputs", arrays, "--json")
    assert ran.exit_code == 0
    checks = {c["name"]: c["status"] for c in json.loads(ran.stdout)["checks"]}
    assert checks == {
        "hashes": "pass", "build against graph": "pass", "agreement with the original": "pass",
    }  # fmt: skip
    assert call("verify", path).exit_code == 0


def test_verify_against_another_model_fails(
    compressed: tuple[Path, Ran], arrays: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.py"
    other.write_text(
        "from tersor.cli.demo.zoo import LeNet5\n\n\ndef model():\n    net = LeNet5()\n"
        "    net.f2.weight.data.neg_()\n    net.f2.bias.data[:] = 0\n    net.f2.bias.data[9] = 99\n"
        "    return net\n",
        encoding="utf-8",
    )
    ran = call("verify", compressed[0], "--model", f"{other}:model", "--inputs", arrays)
    assert ran.exit_code == 4
    assert "agreement with the original" in ran.stdout


def test_explain_one_layer_and_all(compressed: tuple[Path, Ran]) -> None:
    path, ran = compressed
    plan = json.loads(ran.stdout)["record"]["plan"]
    facts = json.loads(call("explain", path, "f1", "--json").stdout)
    assert (facts["site"], facts["level"]) == ("f1", plan["assignment"]["f1"])
    lines = json.loads(call("explain", path, "--json").stdout)
    assert [line["site"] for line in lines] == ["c1", "c2", "f1", "f2"]
    shown = call("explain", path, "f1")
    assert (shown.exit_code, "f1" in shown.stdout) == (0, True)
    wrong = call("explain", path, "f7")
    assert wrong.exit_code == 2
    assert "no site is called 'f7'" in wrong.stderr


def test_report_and_inspect(compressed: tuple[Path, Ran], source: Path) -> None:
    path, _ = compressed
    found = json.loads(call("report", path, "--json").stdout)
    assert found["record"]["verdict"]["size_bytes"] == path.stat().st_size
    assert {"status", "rows", "sites", "price_quality", "notes", "record"} == set(found)
    shown = call("report", path)
    assert (shown.exit_code, "f1" in shown.stdout) == (0, True)
    sites = json.loads(call("inspect", path, "--json").stdout)["sites"]
    assert [site["name"] for site in sites] == ["c1", "c2", "f1", "f2"]
    of_model = call("inspect", f"{source}:model", f"{source}:data", "--keep", "c*", "--json")
    assert of_model.exit_code == 0
    pinned = [s["name"] for s in json.loads(of_model.stdout)["sites"] if s["pinned"]]
    assert pinned == ["c1", "c2"]


def test_export(compressed: tuple[Path, Ran], tmp_path: Path, images: dict[str, Tensor]) -> None:
    path, _ = compressed
    out = tmp_path / "m.xml"
    ran = call("export", path, out, "--json")
    assert ran.exit_code == 0
    assert json.loads(ran.stdout)["saved"] == str(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    x = images["test"][:16]
    found = ov.Core().compile_model(str(out), "CPU")(x.numpy())[0]
    assert close_logits(torch.from_numpy(found), tersor.load(path)(x))
    wrong = call("export", path, tmp_path / "m.tflite")
    assert wrong.exit_code == 2
    assert ".xml, .onnx, .pt2" in wrong.stderr


@pytest.mark.parametrize("command", ["run", "verify", "report", "export", "inspect", "explain"])
def test_a_tampered_artifact_is_code_4(
    compressed: tuple[Path, Ran], arrays: Path, tmp_path: Path, command: str
) -> None:
    path = tmp_path / "tampered.tersor"
    data = bytearray(compressed[0].read_bytes())
    reads_weights = command in {"run", "verify", "export"}
    place = -4000 if reads_weights else data.index(b"manifest.json") + 400
    data[place] ^= 1
    path.write_bytes(data)
    more: dict[str, tuple[object, ...]] = {"run": (arrays,), "export": (tmp_path / "m.pt2",)}
    ran = call(command, path, *more.get(command, ()), "--json")
    assert ran.exit_code == 4, ran.output
    told = json.loads(ran.stdout)["error"]
    assert told["type"] == "ArtifactError"
    assert str(path) in told["message"]
    assert not (tmp_path / "m.pt2").exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"--target": "2 parsecs"}, "parsecs"),
        ({"--target": "2x, 3x"}, "contradicts itself"),
        ({"--out": "/nowhere/at/all.tersor"}, "does not exist"),
        ({"--metric": "SOURCE:percent"}, "tersor.Metric"),
        ({"--metric": "SOURCE:nothing"}, "has no 'nothing'"),
        ({"--backend": "nope"}, "'nope'"),
        ({"--keep": "q*"}, "keep='q*' matches no layer"),
    ],
)
def test_wrong_use_is_code_2_before_any_work(
    source: Path, tmp_path: Path, change: dict[str, str], word: str
) -> None:
    words = list(compress_words(source, tmp_path, "2x"))
    for name, text in change.items():
        value = text.replace("SOURCE", str(source))
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]
    ran = call(*words, "--json")
    assert ran.exit_code == 2
    told: dict[str, Any] = json.loads(ran.stdout)["error"]
    assert word in told["message"]
    assert told["exit_code"] == 2
    assert not (tmp_path / "model.tersor").exists()
    assert records(tmp_path / "warm") == {}


def test_a_cache_that_can_not_be_used_is_code_3(source: Path, tmp_path: Path) -> None:
    (tmp_path / "warm").write_text("a file", encoding="utf-8")
    ran = call(*compress_words(source, tmp_path, "2x"))
    assert ran.exit_code == 3
    assert "pass cache_dir=" in ran.stderr
    assert not (tmp_path / "model.tersor").exists()


def test_interrupted_is_130_and_goes_on(source: Path, lenet_run: Finished, tmp_path: Path) -> None:
    """SIGINT while prices are measured; the same command then finishes."""
    store = warm_copy(lenet_run, tmp_path, ("price", "plan", "transform", "verdict", "measured"))
    before = records(store)
    words = compress_words(source, tmp_path, "size_ratio=3")
    program = "import sys; from tersor.cli.main import main; sys.argv[0] = 'tersor'; main()"
    process = start("-c", program, *words)
    assert process.stdout is not None
    seen = ""
    while "price" not in seen and (line := process.stdout.readline()):
        seen += line
    assert "price" in seen
    out, err = stop_when(process, lambda: True, signal.SIGINT)
    assert process.returncode == 130, (out, err)
    assert "interrupted" in err
    assert f"tersor compress {source}:model" in err  # the command to run again
    assert "Traceback" not in err
    assert records(store) == before
    assert partial_files(store) == []
    assert not (tmp_path / "model.tersor").exists()
    ran = call(*words)
    assert ran.exit_code in {0, 1}
    assert "calibrate" not in ran.stdout
    assert kept_all(before, records(store), is_priced_again=True)
    assert tersor.load(tmp_path / "model.tersor").stats()["calls"] == 0
