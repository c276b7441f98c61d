"""The one reader and writer of files."""

from tersor.artifact.file import (
    Artifact,
    ArtifactFile,
    artifact_bytes,
    read_artifact,
    verify_artifact,
    write_artifact,
)
from tersor.artifact.manifest import FORMAT_VERSION, Manifest, Range, Ranges
from tersor.artifact.sharing import rebuild_segments, share_segments
from tersor.artifact.tensors import RawTensor, read_safetensors, write_safetensors

__all__ = [
    "FORMAT_VERSION",
    "Artifact",
    "ArtifactFile",
    "Manifest",
    "Range",
    "Ranges",
    "RawTensor",
    "artifact_bytes",
    "read_artifact",
    "read_safetensors",
    "rebuild_segments",
    "share_segments",
    "verify_artifact",
    "write_artifact",
    "write_safetensors",
]
