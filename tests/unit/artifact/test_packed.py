"""Packed weights in a file: it holds their bits and nothing of their floats."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tersor.artifact import Artifact, RawTensor, artifact_bytes, read_artifact, verify_artifact
from tersor.artifact.packed import read_layouts, write_layouts
from tersor.core.errors import ArtifactError
from tersor.core.packing import Packing
from tersor.ops.packed import Packed
from tests.unit.artifact.conftest import build_artifact

RNG = np.random.default_rng(0)
GRID = Packing(kind="grid", shape=(64, 128), bits=2, group=64)


def grid() -> Packed:
    steps = RNG.standard_normal((64, 2)).astype("<f2").tobytes()
    return Packed(GRID, RNG.bytes(GRID.parts()[0]) + steps)


def with_packed(packed: Packed) -> Artifact:
    """An artifact whose build's constants are a packed weight's floats, and some of its own."""
    floats, own = packed.expand().tobytes(), RNG.bytes(400)
    build = {
        "model.xml": b"<net/>" * 50,
        "model.bin": floats + own,
        "segments.json": json.dumps([[0, len(floats)], [len(floats), 400]]).encode(),
    }
    plain = build_artifact()
    return replace(plain, builds={**plain.builds, "openvino": build}, packed={"fc.new": packed})


def test_a_file_holds_bits_and_gives_floats(tmp_path: Path) -> None:
    packed = grid()
    artifact = with_packed(packed)
    path = tmp_path / "m.tersor"
    path.write_bytes(artifact_bytes(artifact))
    found = read_artifact(path)
    assert path.stat().st_size < len(packed.data) + 8000 < packed.expand().nbytes
    assert bytes(found.packed["fc.new"].data) == packed.data
    assert np.array_equal(found.tensors["fc.new"].to_numpy(), packed.expand())
    # The constants of the build are put together from the floats, to the last bit.
    assert found.sections("openvino") == artifact.builds["openvino"]
    assert artifact_bytes(verify_artifact(path)) == path.read_bytes()


def test_bits_that_a_build_reads_are_stored_once(tmp_path: Path) -> None:
    packed = grid()
    artifact = with_packed(packed)
    floats, own = packed.expand().tobytes(), RNG.bytes(400)
    sizes = [len(floats), len(packed.data), len(own)]
    build = {
        "model.bin": floats + packed.data + own,
        "segments.json": json.dumps([[sum(sizes[:i]), n] for i, n in enumerate(sizes)]).encode(),
    }
    artifact = replace(artifact, builds={**artifact.builds, "openvino": build})
    path = tmp_path / "m.tersor"
    path.write_bytes(artifact_bytes(artifact))
    assert path.stat().st_size < len(packed.data) + 8000
    found = read_artifact(path)
    assert found.sections("openvino") == build
    assert set(found.packed) == {"fc.new"}
    assert not [name for name in found.tensors if name.startswith("builds.")]
    assert artifact_bytes(verify_artifact(path)) == path.read_bytes()


def test_a_file_without_packed_weights_is_as_before(tmp_path: Path) -> None:
    path = tmp_path / "m.tersor"
    path.write_bytes(artifact_bytes(build_artifact()))
    found = read_artifact(path)
    assert found.packed == {}
    assert "packed.json" not in found.manifest.sha256


def test_a_name_is_given_once() -> None:
    artifact = with_packed(grid())
    twice = replace(artifact, packed={"fc.codes": grid()})
    with pytest.raises(ArtifactError, match=r"\['fc.codes'\] are given as floats and packed"):
        artifact_bytes(twice)
    with pytest.raises(ArtifactError, match="builds"):
        artifact_bytes(replace(artifact, packed={"builds.x": grid()}))


def layouts(**changes: Any) -> bytes:
    content = json.loads(write_layouts({"w": grid()}))
    content["tensors"]["w"] |= changes
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "pickle"}, "lists no layouts .*'pickle'"),
        ({"bits": 1}, "lists no layouts .*found 1 bits"),
        ({"shape": [64, 129]}, "found 2304 bytes, wanted 2496"),
        ({"shape": [2**40, 2**40]}, "found 2304 bytes, wanted"),  # before anything is allocated
        ({"shape": [0, 2**40]}, "sizes of 1 or more"),
        ({"group": -64}, "groups of -64"),
        ({"color": "red"}, r"unknown keys \['color'\]"),
    ],
)
def test_layouts_that_no_writer_made(changes: dict[str, Any], message: str) -> None:
    data = grid().data
    stored = {"w": RawTensor("uint8", (len(data),), data)}
    with pytest.raises(ArtifactError, match=message):
        read_layouts(layouts(**changes), stored, "packed.json")


def test_bits_that_are_absent_or_of_another_type() -> None:
    with pytest.raises(ArtifactError, match="'w' has no bits in the file"):
        read_layouts(layouts(), {}, "packed.json")
    floats = RawTensor("float32", (576,), bytes(2304))
    with pytest.raises(ArtifactError, match="'w' has no bits in the file"):
        read_layouts(layouts(), {"w": floats}, "packed.json")
    with pytest.raises(ArtifactError, match="lists no layouts"):
        read_layouts(b"{", {}, "packed.json")


def test_a_mask_that_lies(tmp_path: Path) -> None:
    packing = Packing(kind="sparse", shape=(8, 8), bits=8, kept=4)
    # All bits set, though the layout says four: refused where the floats are asked for.
    data = bytes([255] * 8) + bytes(16) + bytes(4)
    path = tmp_path / "m.tersor"
    good = Packed(packing, bytes([15]) + bytes(7) + bytes(20))
    whole = artifact_bytes(replace(build_artifact(), packed={"w": good}))
    assert data not in whole
    path.write_bytes(whole)
    opened = read_artifact(path)
    opened.__dict__["packed"] = {"w": Packed(packing, data)}
    with pytest.raises(ArtifactError, match="its mask keeps 64 weights, wanted 4"):
        _ = opened.tensors
