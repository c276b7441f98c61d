"""Weights stored once: a build's constants refer to the tensors of the graph.

A backend's build comes as a text and one block of constants, ``model.bin``, with a list of the
constants in it. Most of them are byte for byte a weight of the graph (its codes, its scales), so
the block is not stored: ``segments.json`` says from which tensors it is put together again.
Constants that nothing else holds become tensors ``builds.<backend>.<i>``.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from tersor.artifact.tensors import RawTensor
from tersor.core.errors import ArtifactError

BLOCK = "model.bin"
SEGMENTS = "segments.json"
RESERVED_PREFIX = "builds."
# A reference and a tensor's header entry take about 150 bytes; smaller constants are kept
# together with their neighbours.
MIN_SHARED_BYTES = 256
# A block may use one tensor several times. More than this many times all the weights is no
# model but an attempt to fill the memory.
MAX_EXPANSION = 16
MAX_EXPANSION_SLACK = 2**20
MAX_SEGMENTS = 2**20


def share_segments(
    sections: Mapping[str, bytes], tensors: Mapping[str, RawTensor], backend: str
) -> tuple[dict[str, bytes], dict[str, RawTensor]]:
    """Replace a build's block of constants by references.

    Args:
        sections: What ``Executable.serialize`` gave. Without ``model.bin`` and ``segments.json``
            ([[offset, size], ...]) they are returned as they are.
        tensors: All tensors that are stored anyway.
        backend: Its name, for the names of the tensors that are added.

    Returns:
        The sections to store, and the tensors to store beside ``tensors``.

    Raises:
        ArtifactError: Segments that overlap or lie outside of the block.
    """
    if BLOCK not in sections or SEGMENTS not in sections:
        return dict(sections), {}
    block = memoryview(sections[BLOCK])
    pieces = _pieces(_parse(sections[SEGMENTS], 2, f"builds/{backend}/{SEGMENTS}"), len(block))
    known = {_sha256(t.data): name for name, t in sorted(tensors.items())}
    added: dict[str, RawTensor] = {}
    references: list[list[Any]] = []
    for begin, end in _merge_small(pieces):
        data = block[begin:end]
        name = known.get(_sha256(data))
        if name is None:
            name = f"{RESERVED_PREFIX}{backend}.{len(added)}"
            known[_sha256(data)] = name
            added[name] = RawTensor("uint8", (end - begin,), bytes(data))
        references.append([begin, end - begin, name])
    if len(block) > max_block_bytes({**tensors, **added}):
        return dict(sections), {}  # no reader would expand it
    stored = {k: v for k, v in sections.items() if k != BLOCK}
    stored[SEGMENTS] = json.dumps({"size": len(block), "segments": references}).encode()
    return stored, added


def rebuild_segments(
    sections: Mapping[str, bytes], tensors: Mapping[str, RawTensor], where: str = "build"
) -> dict[str, bytes]:
    """Put the block of constants together again; the inverse of ``share_segments``.

    ``segments.json`` of the result lists the pieces as [[offset, size], ...], as a backend does.

    Raises:
        ArtifactError: References to tensors that are not there, or whose sizes do not fit, or a
            block larger than any model makes; nothing is allocated before that is known.
    """
    if SEGMENTS not in sections or BLOCK in sections:
        return dict(sections)
    where = f"{where}/{SEGMENTS}"
    size, references = _references(sections[SEGMENTS], where)
    _check_references(size, references, tensors, where)
    rebuilt = {k: v for k, v in sections.items() if k != SEGMENTS}
    rebuilt[BLOCK] = b"".join(tensors[name].data for _, _, name in references)
    rebuilt[SEGMENTS] = json.dumps([[offset, n] for offset, n, _ in references]).encode()
    return rebuilt


def _pieces(segments: list[list[Any]], size: int) -> list[tuple[int, int]]:
    """Segments and the gaps between them, in order, without empty ones."""
    pieces: list[tuple[int, int]] = []
    position = 0
    for offset, n in sorted({(offset, n) for offset, n in segments if n}):
        if offset < position or offset + n > size:
            raise ArtifactError(
                f"{SEGMENTS}: found a constant at [{offset}, {offset + n}], wanted it after "
                f"byte {position} and inside of the {size} bytes of {BLOCK}; the backend's list "
                "of constants is wrong"
            )
        if offset > position:
            pieces.append((position, offset))
        pieces.append((offset, offset + n))
        position = offset + n
    if position < size:
        pieces.append((position, size))
    return pieces


def _merge_small(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join neighbours that are too small to be worth a reference each."""
    merged: list[tuple[int, int]] = []
    is_open = False  # whether the last piece may grow
    for begin, end in pieces:
        is_small = end - begin < MIN_SHARED_BYTES
        if is_small and is_open:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
        is_open = is_small
    return merged


def _parse(data: bytes, width: int, where: str) -> list[list[Any]]:
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not JSON ({error})") from error
    return _check_rows(rows, width, where)


def _check_rows(rows: Any, width: int, where: str) -> list[list[Any]]:
    if not isinstance(rows, list) or len(rows) > MAX_SEGMENTS:
        raise ArtifactError(f"{where}: wanted a list of at most {MAX_SEGMENTS} segments")
    for row in rows:
        is_row = isinstance(row, list) and len(row) == width
        if not is_row or any(type(v) is not int or v < 0 for v in row[:2]):
            raise ArtifactError(
                f"{where}: found a segment {row!r}, wanted [offset, size"
                f"{', tensor name' if width == 3 else ''}]"
            )
    return rows


def _references(data: bytes, where: str) -> tuple[int, list[list[Any]]]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not JSON ({error})") from error
    if not isinstance(content, dict) or set(content) != {"size", "segments"}:
        raise ArtifactError(f"{where}: wanted an object with size and segments")
    if type(content["size"]) is not int:
        raise ArtifactError(f"{where}: found size {content['size']!r}, wanted an integer")
    return content["size"], _check_rows(content["segments"], 3, where)


def _check_references(
    size: int, references: list[list[Any]], tensors: Mapping[str, RawTensor], where: str
) -> None:
    position = 0
    for offset, n, name in references:
        if not isinstance(name, str) or name not in tensors:
            raise ArtifactError(f"{where}: refers to a tensor {name!r} that is not in the file")
        found = len(tensors[name].data)
        if offset != position or n != found:
            raise ArtifactError(
                f"{where}: found {n} bytes at {offset} from tensor {name!r}, wanted its {found} "
                f"bytes at {position}"
            )
        position += n
    if position != size:
        raise ArtifactError(f"{where}: the segments end at {position}, wanted size {size}")
    limit = max_block_bytes(tensors)
    if size > limit:
        raise ArtifactError(
            f"{where}: claims a block of {size} bytes, wanted at most {limit} for these weights"
        )


def max_block_bytes(tensors: Mapping[str, RawTensor]) -> int:
    """The largest block of constants that a file with these tensors may claim."""
    return MAX_EXPANSION * sum(len(t.data) for t in tensors.values()) + MAX_EXPANSION_SLACK


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
