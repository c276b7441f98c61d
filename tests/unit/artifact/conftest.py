import json
from typing import Any

import numpy as np
import pytest

from tersor.artifact import Artifact, Manifest, Range, Ranges, RawTensor
from tersor.core.records import BuildChoice, Plan, Signature, Structure, TensorSpec


def build_artifact(**changes: Any) -> Artifact:
    """A small artifact with everything: a bfloat16 tensor, a shared build and a plain one."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (32, 32)).astype(np.int8)
    own = rng.bytes(300)
    leaf = Structure(kind="tensor")
    ov, plain = BuildChoice(backend="openvino", batch=4), BuildChoice(backend="plain")
    manifest = Manifest(
        tersor="0.1.0",
        created="2026-01-01T00:00:00Z",
        signature=Signature(
            inputs=(TensorSpec(name="x", dtype="float32", shape=(None, 32)),),
            outputs=(TensorSpec(name="y", dtype="float32", shape=(None, 32)),),
            args=Structure(kind="tuple", children=(leaf,)),
            kwargs=Structure(kind="dict"),
            result=leaf,
            parameter_names=("x",),
        ),
        model="ab" * 32,
        choices={"openvino": ov, "plain": plain},
        plan=Plan(
            assignment={"fc": "int8"},
            choice=ov,
            predicted_ms=1.0,
            predicted_bytes=1024,
            predicted_error=0.5,
        ),
        ranges=Ranges(inputs={"x": Range(low=-1.0, high=1.0)}),
        created_by={"torch": "2.13"},
        metadata={"note": ["a", 1]},
    )
    segments = json.dumps([[0, 1024], [1024, 300]]).encode()
    fields: dict[str, Any] = {
        "manifest": manifest,
        "graph": {"nodes": [{"op": "linear", "args": ["x", "fc"]}] * 20},
        "tensors": {
            "fc.codes": RawTensor.from_numpy(weight),
            "fc.scale": RawTensor("bfloat16", (2,), b"\x80?\x00@"),
        },
        "builds": {
            "openvino": {
                "model.xml": b"<net/>" * 50,
                "model.bin": weight.tobytes() + own,
                "segments.json": segments,
            },
            "plain": {"code.bin": b"\x00\x01"},
        },
    }
    return Artifact(**fields | changes)


@pytest.fixture
def artifact() -> Artifact:
    return build_artifact()
