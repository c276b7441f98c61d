import dataclasses
import errno
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tersor.artifact import (
    FORMAT_VERSION,
    Artifact,
    ArtifactFile,
    Range,
    artifact_bytes,
    read_artifact,
    verify_artifact,
    write_artifact,
)
from tersor.artifact.manifest import read_manifest
from tersor.core.errors import ArtifactError, ConfigError, StoreError
from tersor.core.jsonable import dumps


def content(artifact: Artifact | ArtifactFile) -> dict[str, Any]:
    builds = {name: dict(sections) for name, sections in artifact.builds.items()}
    tensors = {n: (t.dtype, t.shape, bytes(t.data)) for n, t in artifact.tensors.items()}
    return {"graph": dict(artifact.graph), "tensors": tensors, "builds": builds}


def test_round_trip(artifact: Artifact, tmp_path: Path):
    path = tmp_path / "m.tersor"
    size = write_artifact(path, artifact)
    assert size == path.stat().st_size
    found = read_artifact(path)
    assert content(found) == content(artifact)
    manifest = found.manifest
    assert manifest.backends == ("openvino", "plain")
    assert set(manifest.sha256) == {
        "graph.json", "weights.safetensors", "builds/openvino/model.xml",
        "builds/openvino/segments.json", "builds/plain/code.bin",
    }  # fmt: skip
    assert dataclasses.replace(manifest, backends=(), sha256={}) == artifact.manifest


def test_the_same_content_gives_the_same_bytes(artifact: Artifact, tmp_path: Path):
    data = artifact_bytes(artifact)
    backwards = dataclasses.replace(
        artifact,
        tensors=dict(reversed(artifact.tensors.items())),
        builds=dict(reversed(artifact.builds.items())),
    )
    assert artifact_bytes(backwards) == data
    # And what was read is written back as it was.
    path = tmp_path / "m.tersor"
    path.write_bytes(data)
    assert artifact_bytes(verify_artifact(path)) == data


def test_weights_are_stored_once(artifact: Artifact):
    data = artifact_bytes(artifact)
    weight = bytes(artifact.tensors["fc.codes"].data)
    assert data.count(weight) == 1
    assert weight in artifact.builds["openvino"]["model.bin"]


def test_it_is_a_plain_zip_with_safetensors_in_it(artifact: Artifact):
    with zipfile.ZipFile(io.BytesIO(artifact_bytes(artifact))) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == "manifest.json"
        assert json.loads(archive.read("graph.json")) == artifact.graph
        types = {i.filename: i.compress_type for i in archive.infolist()}
        assert types["weights.safetensors"] == zipfile.ZIP_STORED
        assert types["builds/openvino/model.xml"] == zipfile.ZIP_DEFLATED
        assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_text_that_deflates_like_a_bomb_is_stored(artifact: Artifact):
    graph = {"zeros": "0" * 10**6}
    data = artifact_bytes(dataclasses.replace(artifact, graph=graph))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.getinfo("graph.json").compress_type == zipfile.ZIP_STORED


def test_large_files_use_zip64(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    path = tmp_path / "m.tersor"
    write_artifact(path, artifact)
    monkeypatch.undo()
    assert b"PK\x06\x06" in path.read_bytes()
    assert content(verify_artifact(path)) == content(artifact)


def test_parts_are_read_and_verified_when_they_are_used(artifact: Artifact, tmp_path: Path):
    one, two = tmp_path / "one.tersor", tmp_path / "two.tersor"
    write_artifact(one, artifact)
    text = json.dumps(artifact.graph).replace("linear", "conv2d")
    write_artifact(two, dataclasses.replace(artifact, graph=json.loads(text), tensors={}))
    found, replaced = read_artifact(one), read_artifact(one)
    assert len(found.tensors) == 2
    one.write_bytes(two.read_bytes())
    assert len(found.tensors) == 2
    with pytest.raises(ArtifactError, match=r"one\.tersor, entry"):
        _ = found.graph
    with pytest.raises(ArtifactError, match=r"one\.tersor, entry"):
        _ = replaced.tensors
    one.unlink()
    with pytest.raises(ArtifactError, match=r"one\.tersor: cannot read .*No such file"):
        found.sections("plain")


def test_reading_and_running_need_neither_torch_nor_a_backend():
    code = "import sys, tersor.artifact, tersor.runtime, tersor.timing; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "tersor.runtime.load" in loaded
    assert not {"torch", "openvino", "onnxruntime", "scipy"} & set(loaded)


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_the_old_file(
    artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    def no_space(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "m.tersor"
    path.write_bytes(b"old")
    monkeypatch.setattr(step, no_space)
    with pytest.raises(StoreError, match=r"m\.tersor: cannot write .*No space left"):
        write_artifact(path, artifact)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.tersor"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"builds": {"openvino": {}}}, r"backends \['plain'\]: wanted both a build and a choice"),
        ({"builds": {"openvino": {"../x": b""}, "plain": {}}}, "points outside of the file"),
        (
            {"builds": {"openvino": {"a b": b""}, "plain": {}}},
            "entry 'builds/openvino/a b' is unknown",
        ),
    ],
)
def test_the_writer_refuses_what_the_reader_would(artifact: Artifact, changes: Any, message: str):
    with pytest.raises(ArtifactError, match=message):
        artifact_bytes(dataclasses.replace(artifact, **changes))


def test_reserved_tensor_names_are_refused(artifact: Artifact):
    tensors = {"builds.x.0": artifact.tensors["fc.codes"]}
    with pytest.raises(ArtifactError, match=r"tensors \['builds.x.0'\]: names that begin with"):
        artifact_bytes(dataclasses.replace(artifact, tensors=tensors))


def test_limits_of_the_writer(artifact: Artifact, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr("tersor.artifact.file.MAX_MANIFEST_BYTES", 100)
        with pytest.raises(ArtifactError, match=r"manifest\.json: \d+ bytes, wanted at most 100"):
            artifact_bytes(artifact)
    monkeypatch.setattr("tersor.artifact.container.MAX_ENTRIES", 3)
    with pytest.raises(ArtifactError, match="found 6 entries, wanted at most 3"):
        artifact_bytes(artifact)


def edited(artifact: Artifact, **changes: Any) -> bytes:
    return json.dumps(json.loads(dumps(artifact.manifest)) | changes).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": FORMAT_VERSION + 1}, "w: found format version 2, wanted 1; read it with"),
        ({"format": None}, "found format version None"),
        ({"surprise": 1}, r"unknown keys \['surprise'\].*the file was edited"),
        ({"model": 3}, "w.model: found 3, wanted str"),
        ({"choices": {"openvino": {"backend": "openvino", "batch": 0}}}, "batch: found 0"),
        ({"ranges": {"inputs": {"x": {"low": 2, "high": 1}}}}, "wanted finite low <= high"),
    ],
)
def test_a_manifest_that_is_none_is_refused(artifact: Artifact, changes: Any, message: str):
    with pytest.raises(ArtifactError, match=message):
        read_manifest(edited(artifact, **changes), "w")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_no_json_is_refused(data: Any):
    with pytest.raises(ArtifactError, match="w is not JSON"):
        read_manifest(data, "w")


@pytest.mark.parametrize("data", [b"[]", b"3", b"{}"])
def test_a_manifest_without_a_version_is_refused(data: Any):
    with pytest.raises(ArtifactError, match="found format version None, wanted 1"):
        read_manifest(data, "w")


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_a_range_is_finite_and_in_order(low: Any, high: Any):
    with pytest.raises(ConfigError, match="wanted finite low <= high"):
        Range(low=low, high=high)
