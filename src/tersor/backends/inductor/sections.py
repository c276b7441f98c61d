"""What a file holds of a build: the graph, where its constants lie, and native code if there is any."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tersor.backends.inductor.host import Host
from tersor.core.errors import ArtifactError, ConfigError, ShapeError
from tersor.core.jsonable import dumps, from_json, to_json
from tersor.core.packing import Packing
from tersor.graph.contracts import Graph, Shapes
from tersor.graph.serial import graph_from_json, graph_tensors, graph_to_json
from tersor.ops.packed import Packed

_NEEDED = ("graph.json", "tensors.json", "model.bin")
_ALIGNED = 64  # bytes
_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError)
_DTYPES = (
    "float32", "float16", "bfloat16", "float64", "int8", "uint8", "int16", "int32", "int64", "bool",
    "float8_e4m3fn",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """Machine code of a build, and the host that it needs.

    Attributes:
        sizes: Of every node's tensor, as text: what a lowering asks of shapes (``lowering.lower``).
    """

    package: bytes
    host: Host
    sizes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


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
    layouts: list[tuple[str, Any, int, int]] = []
    for name, packed in sorted(graph.packed.items()):
        data = bytes(packed.data)
        pieces += [data, bytes(-len(data) % _ALIGNED)]
        layouts.append((name, to_json(packed.packing), offset, len(data)))
        offset += len(data) + -len(data) % _ALIGNED
    segments = sorted({(r[-2], r[-1]) for r in [*rows, *layouts] if r[-1]})
    index = {"tensors": rows, "shapes": {n: list(s) for n, s in sorted(shapes.items())}}
    if layouts:
        index["packed"] = layouts
    sections = {
        "graph.json": dumps(graph_to_json(graph)).encode(),
        "tensors.json": dumps(index).encode(),
        "model.bin": b"".join(pieces),
        "segments.json": dumps(segments).encode(),
    }
    if native is not None:
        sections["native.pt2"] = native.package
        sections["native.json"] = dumps(to_json(native.host)).encode()
        sections["native.sizes.json"] = dumps(to_json(native.sizes)).encode()
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
        layouts = [
            (str(n), from_json(Packing, p, "tensors.json"), int(o), int(z))
            for n, p, o, z in index.get("packed", [])
        ]
        structure = json.loads(sections["graph.json"])
    except _DAMAGE as error:
        raise ArtifactError(
            f"inductor: tensors.json or graph.json is damaged ({error}); write the artifact again"
        ) from error
    if not isinstance(structure, dict):
        raise ArtifactError(
            f"inductor: graph.json holds a {type(structure).__name__}, wanted an object; write the "
            "artifact again"
        )
    tensors = _tensors(rows, block)
    graph = replace(graph_from_json(structure, tensors), packed=_packed(layouts, tensors, block))
    return graph, shapes, _native(sections)


def _packed(
    layouts: Sequence[tuple[str, Packing, int, int]], tensors: Mapping[str, Tensor], block: bytes
) -> dict[str, Packed]:
    """The bits of packed weights.

    Raises:
        ArtifactError: Bits outside of the block, of another size than their layout takes, or of a tensor
            that is not there or has another shape.
    """
    found = {}
    for name, packing, offset, size in layouts:
        inside = 0 <= offset <= offset + size <= len(block)
        shape = tuple(tensors[name].shape) if name in tensors else None
        if not inside or shape != packing.shape:
            raise ArtifactError(
                f"inductor: tensor {name!r} of shape {shape} claims packed bits of {packing.shape} at "
                f"[{offset}, {offset + size}] of {len(block)} bytes; write the artifact again"
            )
        try:
            found[name] = Packed(packing, block[offset : offset + size])
        except ShapeError as error:
            raise ArtifactError(
                f"inductor: tensor {name!r}: {error}; write the artifact again"
            ) from error
    return found


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
        known = json.loads(sections.get("native.sizes.json", b"{}"))
        sizes = {str(n): tuple(map(str, s)) for n, s in known.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"inductor: native.json says of no host ({error}); write the artifact again"
        ) from error
    return Native(package=sections["native.pt2"], host=host, sizes=sizes)
