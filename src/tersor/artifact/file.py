"""The artifact: a model, its builds and what is known about them, in one file without pickles.

A zip with ``manifest.json``, ``graph.json``, ``weights.safetensors``, ``packed.json`` where weights are
packed, and ``builds/<backend>/<file>``. The manifest holds the SHA-256 of every other entry: it shows damage,
not who wrote the file. Weights are stored once, as ``sharing`` says.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tersor.artifact.container import (
    GRAPH,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    PACKED,
    WEIGHTS,
    Entry,
    read_directory,
    read_entry,
    write_container,
)
from tersor.artifact.manifest import Manifest, read_manifest
from tersor.artifact.packed import bits, expanded, read_layouts, write_layouts
from tersor.artifact.sharing import RESERVED_PREFIX, rebuild_segments, share_segments
from tersor.artifact.tensors import RawTensor, read_safetensors, write_safetensors
from tersor.core.errors import ArtifactError
from tersor.core.jsonable import dumps
from tersor.core.store import write_atomic
from tersor.ops.packed import Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """What is in a file, in memory.

    Attributes:
        manifest: What the file says about itself.
        graph: The graph as JSON values; floats that are not finite come back as text.
        tensors: Weights, codes and scales by name; no name begins with ``builds.``.
        packed: Tensors that are stored in fewer bits than their floats take; those are in no
            ``tensors``.
        builds: Sections by file name, by backend.
    """

    manifest: Manifest
    graph: Mapping[str, Any]
    tensors: Mapping[str, RawTensor]
    builds: Mapping[str, Mapping[str, bytes]]
    packed: Mapping[str, Packed] = field(default_factory=dict)


def write_artifact(path: str | Path, artifact: Artifact) -> int:
    """Write an artifact, whole or not at all; returns its size in bytes.

    Raises:
        ArtifactError: A name that is reserved or that a reader would refuse.
        StoreError: The directory can't be written or is full.
    """
    data = artifact_bytes(artifact)
    write_atomic(path, data)
    return len(data)


def artifact_bytes(artifact: Artifact) -> bytes:
    """The file's bytes; the same content always gives the same bytes."""
    names = [*artifact.tensors, *artifact.packed]
    reserved = sorted(name for name in names if name.startswith(RESERVED_PREFIX))
    if reserved:
        raise ArtifactError(
            f"tensors {reserved}: names that begin with {RESERVED_PREFIX!r} are the writer's own; "
            "rename them"
        )
    twice = sorted(set(artifact.tensors) & set(artifact.packed))
    if twice:
        raise ArtifactError(f"tensors {twice} are given as floats and packed; give them once")
    without_choice = sorted(set(artifact.builds) ^ set(artifact.manifest.choices))
    if without_choice:
        raise ArtifactError(
            f"backends {without_choice}: wanted both a build and a choice in the manifest"
        )
    stored = {**artifact.tensors, **bits(artifact.packed)}
    tensors = {**artifact.tensors, **_shared(artifact.packed, PACKED)}
    entries = {GRAPH: dumps(dict(artifact.graph)).encode()}
    if artifact.packed:
        entries[PACKED] = write_layouts(artifact.packed)
    for backend in sorted(artifact.builds):
        sections, added = share_segments(artifact.builds[backend], tensors, backend)
        tensors |= added
        stored |= added
        entries |= {f"builds/{backend}/{name}": data for name, data in sections.items()}
    entries[WEIGHTS] = write_safetensors(stored)
    manifest = replace(
        artifact.manifest,
        backends=tuple(sorted(artifact.builds)),
        sha256={name: hashlib.sha256(data).hexdigest() for name, data in entries.items()},
    )
    text = dumps(manifest, indent=1).encode()
    if len(text) > MAX_MANIFEST_BYTES:
        raise ArtifactError(
            f"{MANIFEST}: {len(text)} bytes, wanted at most {MAX_MANIFEST_BYTES}; "
            "put less into metadata"
        )
    return write_container({MANIFEST: text, **entries})


def _shared(packed: Mapping[str, Packed], where: str) -> dict[str, RawTensor]:
    """What builds may hold of packed tensors: floats by their names, and bits by names of their own."""
    own = {f"{RESERVED_PREFIX}bits.{name}": tensor for name, tensor in bits(packed).items()}
    return {**own, **expanded(packed, where)}


def read_artifact(path: str | Path) -> "ArtifactFile":
    """Open an artifact: the directory and the manifest are checked now, the rest on first use.

    Raises:
        ArtifactError: The file can't be read, is no artifact, is damaged or was edited; the
            message says where, what was found and what was wanted.
    """
    path = Path(path).absolute()
    directory = read_directory(path)
    manifest = read_manifest(read_entry(path, directory[MANIFEST]), f"{path}, entry {MANIFEST}")
    _check_listing(manifest, directory, path)
    return ArtifactFile(path, directory, manifest)


def verify_artifact(path: str | Path) -> Artifact:
    """Read a whole artifact and verify every entry.

    Raises:
        ArtifactError: As ``read_artifact``, or the hash of an entry does not fit.
    """
    opened = read_artifact(path)
    return Artifact(
        manifest=opened.manifest,
        graph=opened.graph,
        tensors={k: t for k, t in opened.tensors.items() if k not in opened.packed},
        builds=opened.builds,
        packed=opened.packed,
    )


class ArtifactFile:
    """An open artifact: the parts of an ``Artifact``, read and verified when they are first used.

    Raises:
        ArtifactError: On first use of a part whose hash does not fit, or that is ill-formed.
    """

    def __init__(self, path: Path, directory: Mapping[str, Entry], manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._directory = directory

    @cached_property
    def graph(self) -> dict[str, Any]:
        """The graph as JSON values."""
        where = f"{self.path}, entry {GRAPH}"
        try:
            graph = json.loads(self._entry(GRAPH))
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{where} is not JSON ({error})") from error
        if not isinstance(graph, dict):
            raise ArtifactError(f"{where}: found a {type(graph).__name__}, wanted an object")
        return graph

    @cached_property
    def tensors(self) -> dict[str, RawTensor]:
        """The graph's tensors, by name; packed ones as the floats that they stand for."""
        return {k: t for k, t in self._expanded.items() if not k.startswith(RESERVED_PREFIX)}

    @cached_property
    def packed(self) -> dict[str, Packed]:
        """The packed tensors, by name."""
        if PACKED not in self._directory:
            return {}
        return read_layouts(self._entry(PACKED), self._stored, f"{self.path}, entry {PACKED}")

    @property
    def builds(self) -> dict[str, dict[str, bytes]]:
        """All sections of all builds."""
        return {backend: self.sections(backend) for backend in self.manifest.backends}

    def sections(self, backend: str) -> dict[str, bytes]:
        """The sections of one build, by file name."""
        prefix = f"builds/{backend}/"
        names = [name for name in self._directory if name.startswith(prefix)]
        stored = {name.removeprefix(prefix): self._entry(name) for name in names}
        return rebuild_segments(stored, self._expanded, f"{self.path}, entry builds/{backend}")

    @cached_property
    def _stored(self) -> dict[str, RawTensor]:
        return read_safetensors(self._entry(WEIGHTS), f"{self.path}, entry {WEIGHTS}")

    @cached_property
    def _expanded(self) -> dict[str, RawTensor]:
        return {**self._stored, **_shared(self.packed, f"{self.path}, entry {WEIGHTS}")}

    def _entry(self, name: str) -> bytes:
        # Hashed as it was read: the file may change, what is used may not.
        data = read_entry(self.path, self._directory[name])
        found, wanted = hashlib.sha256(data).hexdigest(), self.manifest.sha256[name]
        if found != wanted:
            raise ArtifactError(
                f"{self.path}, entry {name}: found SHA-256 {found[:16]}..., wanted "
                f"{wanted[:16]}...; damaged or edited, copy it again from its source"
            )
        return data


def _check_listing(manifest: Manifest, directory: Mapping[str, Entry], path: Path) -> None:
    listed, found = set(manifest.sha256), set(directory) - {MANIFEST}
    if listed != found:
        raise ArtifactError(
            f"{path}: the manifest lists {sorted(listed - found)} that are not there and does not "
            f"list {sorted(found - listed)}; the file was edited"
        )
    built = {name.split("/")[1] for name in found if name.startswith("builds/")}
    if not built == set(manifest.backends) == set(manifest.choices):
        raise ArtifactError(
            f"{path}: found builds for {sorted(built)}, but the manifest names backends "
            f"{sorted(manifest.backends)} and choices for {sorted(manifest.choices)}"
        )
    for name, choice in manifest.choices.items():
        if choice.backend != name:
            raise ArtifactError(f"{path}: the choice for {name} names backend {choice.backend!r}")
