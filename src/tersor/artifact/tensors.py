"""Tensors as bytes with a type and a shape, and the safetensors format over a buffer.

NumPy has no bfloat16 and no 8-bit floats, so a tensor stays raw until somebody asks for an
array. The reader works on a buffer in memory and copies nothing: the safetensors package reads
whole files only, and ours is one entry of an archive. Both directions are tested against it.

Format: 8 bytes, little endian: length of the header; the header, JSON, {name: {dtype, shape,
data_offsets: [begin, end]}}; the data, without gaps. Source: huggingface/safetensors, README.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.core.errors import ArtifactError, ShapeError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
MAX_RANK = 64  # NumPy's own limit
_LENGTH_BYTES = 8
_HEADER_ALIGNMENT = 8  # data begins where a float64 may lie
_DTYPES: dict[str, tuple[str, int]] = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "float32": ("F32", 4),
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float64": ("F64", 8),
}
_NAMES = {code: name for name, (code, _) in _DTYPES.items()}
_NOT_IN_NUMPY = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor: type name as in PyTorch ("bfloat16"), shape, and row-major little-endian bytes.

    Raises:
        ShapeError: An unknown type, a negative size, or bytes that do not fill the shape.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ShapeError(f"dtype {self.dtype!r} is not stored; known are {sorted(_DTYPES)}")
        if len(self.shape) > MAX_RANK or any(size < 0 for size in self.shape):
            raise ShapeError(
                f"shape {self.shape[:MAX_RANK]}: wanted at most {MAX_RANK} sizes of 0 or more"
            )
        wanted = math.prod(self.shape) * _DTYPES[self.dtype][1]
        if len(self.data) != wanted:
            raise ShapeError(
                f"{self.dtype} tensor of shape {self.shape}: found {len(self.data)} bytes, "
                f"wanted {wanted}"
            )

    @classmethod
    def from_numpy(cls, array: NDArray[Any]) -> "RawTensor":
        """Keep a copy of an array."""
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        return cls(array.dtype.name, array.shape, little.tobytes())

    def to_numpy(self) -> NDArray[Any]:
        """The tensor as a read-only array over the same bytes.

        Raises:
            ShapeError: A type that NumPy lacks.
        """
        if self.dtype in _NOT_IN_NUMPY:
            raise ShapeError(f"NumPy has no {self.dtype}; read .data, or store it as float32")
        dtype = np.dtype(self.dtype).newbyteorder("<")
        array = np.frombuffer(self.data, dtype=dtype).reshape(self.shape)
        array.flags.writeable = False
        return array


def write_safetensors(tensors: Mapping[str, RawTensor]) -> bytes:
    """The file's bytes: widest type first, so that every tensor is aligned, then by name."""
    order = sorted(tensors, key=lambda name: (-_DTYPES[tensors[name].dtype][1], name))
    header: dict[str, Any] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + len(tensor.data)
        header[name] = {
            "dtype": _DTYPES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    length = len(text).to_bytes(_LENGTH_BYTES, "little")
    return b"".join([length, text, *(tensors[name].data for name in order)])


def read_safetensors(data: bytes | memoryview, where: str) -> dict[str, RawTensor]:
    """The tensors of a file in memory, as views of ``data``.

    Raises:
        ArtifactError: The header does not fit the file, is not JSON, or describes tensors that
            overlap, leave gaps, lie outside of the data or do not fill their shapes.
    """
    view = memoryview(data)
    header, body = _read_header(view, where)
    tensors: dict[str, RawTensor] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end, dtype, shape = _read_entry(entry, f"{where}, tensor {name!r}")
        if not 0 <= begin <= end <= len(body):
            raise ArtifactError(
                f"{where}, tensor {name!r}: found offsets [{begin}, {end}], wanted them inside "
                f"of the {len(body)} bytes of data; the header was damaged or edited"
            )
        try:
            tensors[name] = RawTensor(dtype, shape, body[begin:end])
        except ShapeError as error:
            raise ArtifactError(f"{where}, tensor {name!r}: {error}") from error
        spans.append((begin, end))
    _check_tiling(spans, len(body), where)
    return tensors


def _read_header(view: memoryview, where: str) -> tuple[dict[str, Any], memoryview]:
    if len(view) < _LENGTH_BYTES:
        raise ArtifactError(f"{where}: found {len(view)} bytes, wanted a header of 8 or more")
    length = int.from_bytes(view[:_LENGTH_BYTES], "little")
    room = min(len(view) - _LENGTH_BYTES, MAX_HEADER_BYTES)
    if length > room:
        raise ArtifactError(
            f"{where}: the header claims {length} bytes, wanted at most {room}; "
            "the file is cut short or was edited"
        )
    body = view[_LENGTH_BYTES + length :]
    try:
        header = json.loads(bytes(view[_LENGTH_BYTES : _LENGTH_BYTES + length]))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ArtifactError(
            f"{where}: the header is a {type(header).__name__}, wanted an object of tensors"
        )
    return header, body


def _read_entry(entry: Any, where: str) -> tuple[int, int, str, tuple[int, ...]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{where}: wanted an object with dtype, shape and data_offsets")
    shape, offsets, code = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not _is_ints(shape) or not _is_ints(offsets) or len(offsets) != 2:
        raise ArtifactError(f"{where}: wanted shape and data_offsets as lists of integers")
    if not isinstance(code, str) or code not in _NAMES:
        raise ArtifactError(f"{where}: found dtype {code!r}, wanted one of {sorted(_NAMES)}")
    return offsets[0], offsets[1], _NAMES[code], tuple(shape)


def _is_ints(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int for v in value)


def _check_tiling(spans: list[tuple[int, int]], size: int, where: str) -> None:
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ArtifactError(
                f"{where}: found a tensor at byte {begin} of the data, wanted it at {position}; "
                "tensors must neither overlap nor leave gaps"
            )
        position = end
    if position != size:
        raise ArtifactError(
            f"{where}: the tensors end at byte {position} of the data, but it has {size}"
        )
