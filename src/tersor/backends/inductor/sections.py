"""What a file holds of a build: the graph, where its constants lie, and native code if there is any."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.backends.inductor.host import Host
from tersor.core.errors import ArtifactError
from tersor.core.jsonable import dumps, from_json, to_json
from tersor.graph.contracts import Graph, Shapes
from tersor.graph.serial import graph_from_json, graph_tensors, graph_to_json

_NEEDED = ("graph.json", "tensors.json", "model.bin")
_ALIGNED = 64  # bytes
_DTYPES = (
    "float32", "float16", "bfloat16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """Machine code of a build, and the host that it needs."""

    package: bytes
    host: Host


def written(graph: Graph, shapes: Shapes, native: Native | None) -> dict[str, bytes]:
    """The sections of a build."""
    rows: list[tuple[str, str, list[int], int, int]] = []
    pieces: list[bytes] = []
    offset = 0
    placed: dict[tuple[int, tuple[int, ...], str], int] = {}
    for name, tensor in sorted(graph_tensors(graph).items()):
        plain = tensor.detach().cpu().contiguous()
        dtype = str(plain.dtype).removeprefix("torch.")
        size = plain.numel() * plain.element_size()
        key = (tensor.data_ptr(), tuple(plain.shape), dtype)
        at = placed.get(key) if size else None
        if at is None:
            at = placed[key] = offset
            data = plain.reshape(-1).view(torch.uint8).numpy().tobytes() if size else b""
            pad = -size % _ALIGNED
            pieces += [data, bytes(pad)]
            offset += size + pad
        rows.append((name, dtype, list(plain.shape), at, size))
    segments = sorted({(r[3], r[4]) for r in rows if r[4]})
    index = {"tensors": rows, "shapes": {n: list(s) for n, s in sorted(shapes.items())}}
    sections = {
        "graph.json": dumps(graph_to_json(graph)).encode(),
        "tensors.json": dumps(index).encode(),
        "model.bin": b"".join(pieces),
        "segments.json": dumps(segments).encode(),
    }
    if native is not None:
        sections["native.pt2"] = native.package
        sections["native.json"] = dumps(to_json(native.host)).encode()
    return sections


def read(sections: Mapping[str, bytes]) -> tuple[Graph, Shapes, Native | None]:
    """Take the sections apart.

    Raises:
        ArtifactError: A section is missing or damaged; says which.
    """
    missing = sorted(set(_NEEDED) - set(sections))
    if missing:
        raise ArtifactError(
            f"inductor: sections {missing} are missing, found {sorted(sections)}; write the "
            "artifact again"
        )
    block = sections["model.bin"]
    try:
        index = json.loads(sections["tensors.json"])
        rows = [
            (str(n), str(t), tuple(map(int, s)), int(o), int(z))
            for n, t, s, o, z in index["tensors"]
        ]
        shapes = {str(n): tuple(map(int, s)) for n, s in index["shapes"].items()}
        structure = json.loads(sections["graph.json"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"inductor: tensors.json or graph.json is damaged ({error}); write the artifact again"
        ) from error
    if not isinstance(structure, dict):
        raise ArtifactError(
            f"inductor: graph.json holds a {type(structure).__name__}, wanted an object; write the "
            "artifact again"
        )
    tensors = _tensors(rows, block)
    return graph_from_json(structure, tensors), shapes, _native(sections)


def _tensors(
    rows: list[tuple[str, str, tuple[int, ...], int, int]], block: bytes
) -> dict[str, Tensor]:
    known: dict[tuple[Any, ...], Tensor] = {}
    found = {}
    for name, dtype, shape, offset, size in rows:
        inside = 0 <= offset <= offset + size <= len(block)
        if dtype not in _DTYPES or not inside or min(shape, default=0) < 0:
            raise ArtifactError(
                f"inductor: tensor {name!r} claims {dtype} {shape} at [{offset}, {offset + size}] of "
                f"{len(block)} bytes; write the artifact again"
            )
        kind = getattr(torch, dtype)
        count = int(np.prod(shape, dtype=np.int64))
        if count * kind.itemsize != size:
            raise ArtifactError(
                f"inductor: tensor {name!r}: found {size} bytes, wanted {count * kind.itemsize} for "
                f"{dtype} {shape}; write the artifact again"
            )
        key = (dtype, shape, offset, size)
        if key not in known:
            raw = np.frombuffer(block, np.uint8, size, offset).copy()
            known[key] = (
                torch.from_numpy(raw).view(kind).reshape(shape)
                if size
                else torch.zeros(shape, dtype=kind)
            )
        found[name] = known[key]
    return found


def _native(sections: Mapping[str, bytes]) -> Native | None:
    if "native.pt2" not in sections:
        return None
    try:
        host = from_json(Host, json.loads(sections.get("native.json", b"")), "native.json")
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"inductor: native.json says of no host ({error}); write the artifact again"
        ) from error
    return Native(package=sections["native.pt2"], host=host)
