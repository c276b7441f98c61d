"""Exported programs and .pt2 files: captured like modules, and nothing in a file is run."""

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.capture.archive import read_pt2
from tersor.capture.module import capture
from tersor.capture.programs import as_module, open_model
from tersor.core.errors import CaptureError
from tersor.graph.edit import parameters_by_name
from tests.unit.capturing import random, samples, scale_error, trained

ROUNDINGS = 1e-5
DIM = torch.export.Dim


class Model(nn.Module):
    """Positional and named inputs, nested outputs, a buffer and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("shift", torch.arange(8.0))

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        hidden = self.drop(torch.relu(self.a(x) + self.shift)) * scale
        return {"y": self.b(hidden), "rest": (hidden,)}


def exported(batch: Any = None, *, train: bool = False) -> torch.export.ExportedProgram:
    model = trained(Model())
    model.train(train)
    dim = {0: batch} if batch is not None else None
    shapes = None if batch is None else {"x": dim, "scale": dim}
    return torch.export.export(
        model, (random(2, 4),), {"scale": random(2, 1)}, dynamic_shapes=shapes
    )


def item(size: int = 6, seed: int = 0) -> dict[str, Tensor]:
    return {"x": random(size, 4, seed=seed), "scale": random(size, 1, seed=seed + 1)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt2"
    torch.export.save(exported(DIM("batch")), path)
    return path


def check(program: Any) -> None:
    found = capture(program, samples(item()))
    fresh = item(5, seed=3)
    with torch.no_grad():
        wanted = trained(Model())(**fresh)
    y, hidden = found.graph.run([fresh["x"], fresh["scale"]])
    assert scale_error(y, wanted["y"]) <= ROUNDINGS
    assert scale_error(hidden, wanted["rest"][0]) <= ROUNDINGS
    assert scale_error(found.original(**fresh)["y"], wanted["y"]) <= ROUNDINGS
    signature = found.graph.signature
    assert [s.name for s in signature.inputs] == ["x", "scale"]
    assert signature.result.keys == ("y", "rest")
    assert set(parameters_by_name(found.graph.module)) >= {"a.weight", "b.weight"}


def test_a_program() -> None:
    program = exported(DIM("batch"))
    before = {k: v.clone() for k, v in program.state_dict.items()}
    check(program)
    assert all(torch.equal(before[k], v) for k, v in program.state_dict.items())


def test_a_file(saved: Path) -> None:
    check(open_model(saved))
    check(open_model(str(saved)))


class Views(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], 2, 2).sum(-1)


def test_a_program_of_one_batch_size_is_exported_again_where_it_can_be() -> None:
    check(exported())


def test_a_program_of_one_batch_size_is_told_how_to_export_again() -> None:
    program = torch.export.export(Views(), (random(2, 4),))
    with pytest.raises(CaptureError) as caught:
        capture(program, samples(random(6, 4)))
    message = str(caught.value)
    assert "ExportedProgram: the program was exported for one batch size" in message
    assert "torch.export.Dim('batch')" in message
    assert capture(Views(), samples(random(6, 4))).graph  # what the message says works


def test_a_program_in_training_mode_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"training mode \(node dropout\); call model.eval\(\)"):
        capture(exported(DIM("batch"), train=True), samples(item()))


def test_as_module_leaves_modules_alone() -> None:
    model = nn.Linear(2, 2)
    assert as_module(model) is model
    assert open_model(model) is model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("model.onnx", "ONNX files are not read yet; pass the PyTorch model"),
        ("model.pt", "a pickle, which runs code; load it yourself"),
        ("model.tersor", "compressed already"),
        ("model", "load it and pass the model"),
        (3, "found int, wanted a torch.nn.Module, a torch.export.ExportedProgram"),
    ],
)
def test_what_is_no_model(model: Any, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        open_model(model)


# --- files that bring more than a model


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


Entries = dict[str, bytes]


def changed(path: Path, change: Callable[[Entries, str], None]) -> Path:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(entries)).partition("/")[0]
    change(entries, root)
    out = path.with_name("changed.pt2")
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out


def edited(key: str, value: str) -> Callable[[Entries, str], None]:
    """The first text under that key anywhere in the model."""

    def change(entries: Entries, root: str) -> None:
        name = f"{root}/models/model.json"
        model = json.loads(entries[name])
        assert _set(model, key, value)
        entries[name] = json.dumps(model).encode()

    return change


def _set(node: Any, key: str, value: str) -> bool:
    if isinstance(node, dict):
        if isinstance(node.get(key), str):
            node[key] = value
            return True
        return any(_set(v, key, value) for v in node.values())
    return isinstance(node, list) and any(_set(v, key, value) for v in node)


def test_sample_inputs_are_not_unpickled(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    def change(entries: Entries, root: str) -> None:
        entries[f"{root}/data/sample_inputs/model.pt"] = pickle.dumps(Bomb(mark))

    path = changed(saved, change)
    check(read_pt2(path))
    assert not mark.exists()
    with pytest.raises(Exception):  # noqa: B017, PT011 - what torch's own reader does with it
        torch.export.load(path)
    assert mark.exists()


def test_pickled_weights_and_objects_are_refused(saved: Path) -> None:
    def pickled(entries: Entries, root: str) -> None:
        name = f"{root}/data/weights/model_weights_config.json"
        config = json.loads(entries[name])
        next(iter(config["config"].values()))["use_pickle"] = True
        entries[name] = json.dumps(config).encode()

    def custom(entries: Entries, root: str) -> None:
        entries[f"{root}/data/constants/custom_obj_0"] = b""

    for change, words in ((pickled, "is stored as a pickle"), (custom, "is a pickled object")):
        with pytest.raises(CaptureError, match=f"{words}; export it again"):
            read_pt2(changed(saved, change))


CODE = "__import__('os').mkdir('ran')"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("expr_str", CODE, "is no size expression"),
        ("expr_str", "Symbol('s0').func.__globals__", "is no size expression"),
        ("expr_str", "Lambda(Symbol('s0'), 1)", "is no size expression"),
        ("expr_str", "Symbol('os.system')", "is no size expression"),
        ("expr_str", "(" * 5000, "is no size expression"),
        ("target", "torch.hub.load", "is no op of a plain graph"),
        ("target", "torch.ops.aten.from_file.default", "is no op of a plain graph"),
        ("target", "_operator.methodcaller", "is no op of a plain graph"),
        ("target", "torch.ops.load_library", "is no op of a plain graph"),
        ("stack_trace", "default_factory_module", "import Python objects"),
    ],
)
def test_code_in_a_file_is_refused(saved: Path, key: str, value: str, words: str) -> None:
    with pytest.raises(CaptureError, match=words):
        read_pt2(changed(saved, edited(key, value)))


def test_guards_of_a_file_are_not_kept(saved: Path) -> None:
    def change(entries: Entries, root: str) -> None:
        name = f"{root}/models/model.json"
        model = json.loads(entries[name])
        model["guards_code"] = [CODE]
        entries[name] = json.dumps(model).encode()

    assert read_pt2(changed(saved, change))._guards_code == []


def test_files_that_are_no_program(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="no such file"):
        read_pt2(tmp_path / "absent.pt2")
    path = tmp_path / "other.pt2"
    path.write_bytes(b"text")
    with pytest.raises(CaptureError, match=r"wanted a \.pt2 that torch.export.save wrote"):
        read_pt2(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b", "c")
    with pytest.raises(CaptureError, match="holds no exported program"):
        read_pt2(path)


def test_a_damaged_program(saved: Path) -> None:
    def change(entries: Entries, root: str) -> None:
        name = f"{root}/models/model.json"
        entries[name] = entries[name].replace(b'"graph_module"', b'"graph_modul"')

    with pytest.raises(CaptureError, match=r"can't read it .*export the model again"):
        read_pt2(changed(saved, change))
