import json

import pytest

from tersor.artifact import Artifact, Manifest, RawTensor, artifact_bytes
from tersor.core.records import BuildChoice, Signature, Structure, TensorSpec


@pytest.fixture(scope="session")
def good() -> bytes:
    """The bytes of a valid artifact with every kind of entry."""
    leaf = Structure(kind="tensor")
    spec = TensorSpec(name="x", dtype="float32", shape=(None, 2))
    weight = bytes(range(256)) * 2
    manifest = Manifest(
        tersor="0.1.0",
        created="now",
        signature=Signature(
            inputs=(spec,),
            outputs=(spec,),
            args=Structure(kind="tuple", children=(leaf,)),
            kwargs=Structure(kind="dict"),
            result=leaf,
        ),
        model="m",
        choices={"ov": BuildChoice(backend="ov")},
    )
    builds = {
        "model.xml": b"<layer/>" * 20,
        "model.bin": weight + b"tail",
        "segments.json": json.dumps([[0, 512], [512, 4]]).encode(),
    }
    return artifact_bytes(
        Artifact(
            manifest=manifest,
            graph={"nodes": ["a", "b"]},
            tensors={"w": RawTensor("int8", (512,), weight)},
            builds={"ov": builds},
        )
    )
