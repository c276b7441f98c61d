"""Packed weights to floats: NumPy alone, as artifacts are read where there is no torch.

It is the only reader of ``core.packing``'s layouts: the graph that is searched, the build and the
loaded artifact all get their floats from here, so that they are equal to the last bit. Every value is a
product of an 8-bit code and a float16 step, which float32 holds exactly, or a float16 entry.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tersor.core.errors import ConfigError, ShapeError
from tersor.core.packing import FLOAT_BITS, GROUP, GROUPS_OF_BYTE, PLACES, Packing

Floats = NDArray[np.float32]
BYTE = 8
# Codes that are unpacked at a time: their bits take 8 MiB.
_CHUNK_CODES = 2**20


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed weight.

    Raises:
        ShapeError: The bytes are not as many as the layout takes.
    """

    packing: Packing
    data: bytes | memoryview

    def __post_init__(self) -> None:
        wanted = self.packing.size_bytes()
        if len(self.data) != wanted:
            raise ShapeError(
                f"packed weight {self.packing.shape} ({self.packing.kind}, {self.packing.bits} "
                f"bits): found {len(self.data)} bytes, wanted {wanted}"
            )

    def expand(self) -> Floats:
        """The weight, in its own shape.

        Memory is bounded by the data: 32 bytes for one, where only a mask is left, as the
        constructor has compared the sizes.

        Raises:
            ShapeError: A mask with another number of kept weights than the layout says, or pairs whose
                order names an input twice or whose bytes name no places.
        """
        read = {"grid": _grid, "table": _table, "sparse": _sparse, "pairs": _pairs}[
            self.packing.kind
        ]
        return read(self.packing, self._parts()).reshape(self.packing.shape)

    def coded(self) -> tuple[NDArray[np.uint8], Floats]:
        """Codes from 0 [outputs, inputs], and what makes them values.

        Returns:
            Of tables the entries [tables, 2**bits]; of a grid the steps [outputs, steps], whose
            multiples code - 2**(bits - 1) are the values.

        Raises:
            ConfigError: A layout of another kind.
        """
        if self.packing.kind not in ("grid", "table"):
            raise ConfigError(
                f"packed weight {self.packing.shape}: found the kind {self.packing.kind}, wanted grid or "
                "table; expand it"
            )
        rows, values = self._parts()
        codes = unpack_bits(_rows(rows, self.packing), self.packing.bits, self.packing.inputs)
        count = self.packing.tables if self.packing.kind == "table" else self.packing.outputs
        return codes, _half(values).reshape(count, -1)

    def _parts(self) -> list[NDArray[np.uint8]]:
        ends = np.cumsum(self.packing.parts())[:-1]
        return np.split(np.frombuffer(self.data, dtype=np.uint8), ends)


def unpack_bits(stream: NDArray[np.uint8], bits: int, n_codes: int) -> NDArray[np.uint8]:
    """Codes from 0 of each row of bytes [rows, bytes] -> [rows, n_codes]; see ``core.packing``."""
    if bits == BYTE:
        return stream[:, :n_codes]
    if BYTE % bits == 0:
        places = np.arange(0, BYTE, bits, dtype=np.uint8)
        codes = (stream[:, :, None] >> places) & np.uint8((1 << bits) - 1)
        return codes.reshape(len(stream), -1)[:, :n_codes]
    found = np.empty((len(stream), n_codes), dtype=np.uint8)
    powers = (1 << np.arange(bits)).astype(np.uint8)
    # Eight codes end at a whole byte, whatever their width: pieces begin there.
    width = max(BYTE, min(n_codes, _CHUNK_CODES) // BYTE * BYTE)
    height = max(1, _CHUNK_CODES // width)
    for top in range(0, len(stream), height):
        for left in range(0, n_codes, width):
            count = min(width, n_codes - left)
            start, stop = left * bits // BYTE, -(-(left + count) * bits // BYTE)
            flat = np.unpackbits(stream[top : top + height, start:stop], axis=1, bitorder="little")
            codes = flat[:, : count * bits].reshape(-1, count, bits)
            found[top : top + height, left : left + count] = codes @ powers
    return found


def _signed(stream: NDArray[np.uint8], bits: int, n_codes: int) -> Floats:
    """Codes around zero, as floats [rows, n_codes]."""
    codes = unpack_bits(stream, bits, n_codes).astype(np.float32)
    codes -= np.float32(1 << (bits - 1))
    return codes


def _half(part: NDArray[np.uint8]) -> Floats:
    return part.view("<f2").astype(np.float32)


def _grid(packing: Packing, parts: list[NDArray[np.uint8]]) -> Floats:
    values = _signed(_rows(parts[0], packing), packing.bits, packing.inputs)
    steps = _half(parts[1]).reshape(packing.outputs, packing.steps)
    width = packing.group or packing.inputs
    for k in range(packing.steps):
        values[:, k * width : (k + 1) * width] *= steps[:, k : k + 1]
    return values


def _table(packing: Packing, parts: list[NDArray[np.uint8]]) -> Floats:
    codes = unpack_bits(_rows(parts[0], packing), packing.bits, packing.inputs)
    tables = _half(parts[1]).reshape(packing.tables, 1 << packing.bits)
    if not packing.per_output:
        only: Floats = tables[0][codes]
        return only
    found: Floats = np.take_along_axis(tables, codes.astype(np.intp), axis=1)
    return found


def _sparse(packing: Packing, parts: list[NDArray[np.uint8]]) -> Floats:
    count = packing.outputs * packing.inputs
    mask = np.unpackbits(parts[0], bitorder="little")[:count].astype(bool)
    found = int(mask.sum())
    if found != packing.kept:
        raise ShapeError(
            f"packed weight {packing.shape}: its mask keeps {found} weights, wanted {packing.kept}"
        )
    values = np.zeros(count, dtype=np.float32)
    if packing.bits == FLOAT_BITS:
        values[mask] = parts[2].view("<f4")
        return values
    values[mask] = _signed(parts[2].reshape(1, -1), packing.bits, packing.kept)[0]
    table: Any = values.reshape(packing.outputs, packing.inputs)
    table *= _half(parts[1]).reshape(-1, 1)
    return values


def _pairs(packing: Packing, parts: list[NDArray[np.uint8]]) -> Floats:
    order = parts[0].view(packing.order_type)
    if not np.array_equal(np.sort(order), np.arange(packing.inputs, dtype=order.dtype)):
        raise ShapeError(
            f"packed weight {packing.shape}: its order of {packing.inputs} inputs does not name "
            "each once"
        )
    ways = len(PLACES)
    if len(parts[1]) and int(parts[1].max()) >= ways**GROUPS_OF_BYTE:
        raise ShapeError(
            f"packed weight {packing.shape}: found a byte of {int(parts[1].max())} for the places of "
            f"{GROUPS_OF_BYTE} pairs, wanted less than {ways**GROUPS_OF_BYTE}"
        )
    groups = packing.outputs * packing.fours
    powers = np.array([ways**i for i in range(GROUPS_OF_BYTE)], dtype=np.uint8)
    numbers = (parts[1][:, None] // powers % ways).reshape(-1)[:groups]
    places = np.array(PLACES, dtype=np.uint8)[numbers]
    count = places.size
    if packing.bits == FLOAT_BITS:
        kept: Floats = parts[3].view("<f4")
    else:
        kept = _signed(parts[3].reshape(1, -1), packing.bits, count)[0]
    values = np.zeros((groups, GROUP), dtype=np.float32)
    np.put_along_axis(values, places.astype(np.intp), kept.reshape(places.shape), axis=1)
    rows = values.reshape(packing.outputs, -1)[:, : packing.inputs]
    found = np.empty_like(rows)
    found[:, order] = rows
    if packing.bits != FLOAT_BITS:
        found *= _half(parts[2]).reshape(-1, 1)
    return found


def _rows(part: NDArray[np.uint8], packing: Packing) -> NDArray[np.uint8]:
    return part.reshape(packing.outputs, len(part) // packing.outputs)
