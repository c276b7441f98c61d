"""Packed weights in a file: their layouts in ``packed.json``, their bits among the tensors.

A build's constants and the graph's tensors are the floats that the bits stand for, so that no backend
and no graph knows of packing: the writer refers to those floats, the reader makes them again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from tersor.artifact.tensors import RawTensor
from tersor.core.errors import ArtifactError, ConfigError, ShapeError
from tersor.core.jsonable import dumps, from_json
from tersor.core.packing import Packing
from tersor.ops.packed import Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Layouts:
    """Tensor -> the layout of its bits."""

    tensors: Mapping[str, Packing]


def write_layouts(packed: Mapping[str, Packed]) -> bytes:
    """``packed.json``."""
    return dumps(Layouts(tensors={name: packed[name].packing for name in sorted(packed)})).encode()


def read_layouts(data: bytes, stored: Mapping[str, RawTensor], where: str) -> dict[str, Packed]:
    """The packed tensors of a file.

    Args:
        data: ``packed.json``.
        stored: All tensors of the file.
        where: For messages.

    Raises:
        ArtifactError: No JSON, an unknown layout, or bits that are absent or of another size: nothing
            is expanded whose size its bits do not bear out.
    """
    try:
        layouts = from_json(Layouts, json.loads(data), where)
    except (ValueError, RecursionError, ConfigError) as error:
        raise ArtifactError(f"{where} lists no layouts ({error}); the file was edited") from error
    found = {}
    for name, packing in layouts.tensors.items():
        tensor = stored.get(name)
        if tensor is None or tensor.dtype != "uint8":
            raise ArtifactError(f"{where}: tensor {name!r} has no bits in the file; it was edited")
        try:
            found[name] = Packed(packing, tensor.data)
        except ShapeError as error:
            raise ArtifactError(f"{where}, tensor {name!r}: {error}") from error
    return found


def bits(packed: Mapping[str, Packed]) -> dict[str, RawTensor]:
    """What is stored of packed tensors."""
    return {n: RawTensor("uint8", (len(p.data),), p.data) for n, p in packed.items()}


def expanded(packed: Mapping[str, Packed], where: str) -> dict[str, RawTensor]:
    """The floats that packed tensors stand for.

    Raises:
        ArtifactError: A mask that does not fit its layout.
    """
    try:
        return {name: RawTensor.from_numpy(p.expand()) for name, p in packed.items()}
    except ShapeError as error:
        raise ArtifactError(f"{where}: {error}; the file was edited") from error
