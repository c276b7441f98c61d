"""Named entries in one zip file: deterministic bytes out, nothing unbounded in.

The reader allows what the writer writes and no more. Entries lie end to end, so that every byte
of the file belongs to one of them; every size is checked before anything of that size is
allocated; names are from a closed set, and nothing is ever extracted to a path.
"""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tersor.core.errors import ArtifactError, NoFileError

MANIFEST = "manifest.json"
GRAPH = "graph.json"
WEIGHTS = "weights.safetensors"
PACKED = "packed.json"  # only where weights are packed
REQUIRED = (MANIFEST, GRAPH, WEIGHTS)
MAX_ENTRIES = 1024
MAX_NAME_BYTES = 200
MAX_DIRECTORY_BYTES = MAX_ENTRIES * (46 + MAX_NAME_BYTES + 32)  # header, name, zip64 field
MAX_MANIFEST_BYTES = 16 * 2**20  # a plan of 10^5 sites
MAX_TEXT_BYTES = 512 * 2**20  # deflated entries, expanded: graphs and IR texts
MAX_ENTRY_BYTES = 2**40
MAX_RATIO = 200  # JSON and XML of real graphs deflate 5 to 60 times, a bomb 1000 times

_NAME = re.compile(r"builds/[a-z0-9_]+/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_DEFLATED_SUFFIXES = (".json", ".xml")
_DEFLATE_LEVEL = 9
_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can say: same content, same bytes
_UNIX = 3
_MODE = 0o644 << 16
_LOCAL = struct.Struct("<4s5H3L2H")  # PKWARE appnote 4.3.7
_END = struct.Struct("<4s4H2LH")  # 4.3.16
_END64_LOCATOR_BYTES = 20  # 4.3.15
_END64 = struct.Struct("<4sQ2H2L4Q")  # 4.3.14
_IN_ZIP64 = 0xFFFFFFFF  # a size that stands in the zip64 field instead
_ZIP64_FIELD_BYTES = 20


@dataclass(frozen=True, slots=True)
class Entry:
    """Where an entry's data lies in the file."""

    name: str
    offset: int  # of its local header
    stored_bytes: int
    size: int
    is_deflated: bool
    crc: int


def write_container(entries: Mapping[str, bytes]) -> bytes:
    """The file's bytes: the manifest first, then by name.

    Raises:
        ArtifactError: Names or a number of entries that the reader would refuse.
    """
    if len(entries) > MAX_ENTRIES:
        raise ArtifactError(f"found {len(entries)} entries, wanted at most {MAX_ENTRIES}")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", allowZip64=True) as archive:
        for name in sorted(entries, key=lambda n: (n != MANIFEST, n)):
            _check_name(name, "artifact")
            info = zipfile.ZipInfo(name, _TIME)
            info.create_system, info.external_attr = _UNIX, _MODE
            info.compress_type = _compression(name, entries[name])
            archive.writestr(info, entries[name], compresslevel=_DEFLATE_LEVEL)
    return buffer.getvalue()


def read_directory(path: Path) -> dict[str, Entry]:
    """The entries of a file, checked, by name; reads no data.

    Raises:
        ArtifactError: No zip, cut short, or anything in the directory that a writer of artifacts
            does not write; one message a cause.
    """
    with _open(path) as stream:
        end = _read_end(stream, path)
        try:
            infos = zipfile.ZipFile(stream).infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            raise ArtifactError(f"{path}: damaged directory ({error}); copy it again") from error
        entries: dict[str, Entry] = {}
        for info in infos:
            entry = _checked(info, str(path))
            if entry.name in entries:
                raise ArtifactError(f"{path}: entry {entry.name} is there twice; it was edited")
            entries[entry.name] = entry
        missing = [name for name in REQUIRED if name not in entries]
        if missing:
            raise ArtifactError(f"{path}: entries {missing} are missing; this is no whole artifact")
        _check_tiling(stream, entries.values(), end, path)
    return entries


def read_entry(path: Path, entry: Entry) -> bytes:
    """The data of one entry, expanded; its CRC is checked.

    Raises:
        ArtifactError: Data that does not expand to the size that the directory says.
    """
    where = f"{path}, entry {entry.name}"
    with _open(path) as stream:
        stream.seek(_data_offset(stream, entry, where))
        data = stream.read(entry.stored_bytes)
    if len(data) != entry.stored_bytes:
        raise ArtifactError(
            f"{where}: found {len(data)} bytes, wanted {entry.stored_bytes}; the file is cut short"
        )
    if entry.is_deflated:
        data = _inflate(data, entry.size, where)
    if zlib.crc32(data) != entry.crc:
        raise ArtifactError(f"{where}: its checksum does not fit; damaged or edited, copy it again")
    return data


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise NoFileError(
            f"{path}: cannot read ({error.strerror or error}); give the path of an artifact"
        ) from error


def _compression(name: str, data: bytes) -> int:
    if not name.endswith(_DEFLATED_SUFFIXES) or len(data) > MAX_TEXT_BYTES:
        return zipfile.ZIP_STORED
    deflated = len(zlib.compress(data, _DEFLATE_LEVEL, wbits=-zlib.MAX_WBITS))
    pays = deflated < len(data) <= MAX_RATIO * deflated
    return zipfile.ZIP_DEFLATED if pays else zipfile.ZIP_STORED


def _read_end(stream: BinaryIO, path: Path) -> int:
    """Where the directory ends; bounds its size before ``zipfile`` reads it."""
    size = stream.seek(0, io.SEEK_END)
    start = size - _END.size
    stream.seek(max(start, 0))
    tail = stream.read(_END.size)
    if start < 0 or not tail.startswith(b"PK\x05\x06"):
        stream.seek(0)
        is_cut = stream.read(4) == b"PK\x03\x04"
        raise ArtifactError(
            f"{path}: the directory at its end is missing; it is cut short, copy it again"
            if is_cut
            else f"{path}: not a zip file; wanted an artifact written by result.save()"
        )
    _, _, _, _, count, directory_bytes, _, comment_bytes = _END.unpack(tail)
    if comment_bytes:
        raise ArtifactError(f"{path}: has a zip comment, which artifacts do not; it was edited")
    start, count, directory_bytes = _read_end64(stream, start) or (start, count, directory_bytes)
    if count > MAX_ENTRIES or directory_bytes > MAX_DIRECTORY_BYTES:
        raise ArtifactError(
            f"{path}: the directory claims {count} entries in {directory_bytes} bytes, wanted at "
            f"most {MAX_ENTRIES} in {MAX_DIRECTORY_BYTES}"
        )
    if directory_bytes > start:
        raise ArtifactError(f"{path}: the directory is larger than the file; it is cut short")
    return start - directory_bytes


def _read_end64(stream: BinaryIO, end: int) -> tuple[int, int, int] | None:
    """Start, entries and directory bytes of the zip64 record of large files, if there is one."""
    start = end - _END64_LOCATOR_BYTES - _END64.size
    if start < 0:
        return None
    stream.seek(start)
    record, locator = stream.read(_END64.size), stream.read(4)
    if locator != b"PK\x06\x07" or not record.startswith(b"PK\x06\x06"):
        return None
    fields = _END64.unpack(record)
    return start, int(fields[7]), int(fields[8])


def _check_name(name: str, where: str) -> None:
    if name in (*REQUIRED, PACKED) or (_NAME.fullmatch(name) and len(name) <= MAX_NAME_BYTES):
        return
    parts = re.split(r"[/\\]", name)
    if name.startswith(("/", "\\")) or ".." in parts or "\\" in name or ":" in name:
        raise ArtifactError(f"{where}: entry {name!r} points outside of the file; do not trust it")
    raise ArtifactError(
        f"{where}: entry {name[:MAX_NAME_BYTES]!r} is unknown; wanted {', '.join(REQUIRED)}, "
        f"{PACKED} or "
        "builds/<backend>/<file>"
    )


def _checked(info: zipfile.ZipInfo, where: str) -> Entry:
    _check_name(info.orig_filename, where)
    where = f"{where}, entry {info.filename}"
    if info.flag_bits or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArtifactError(
            f"{where}: encrypted, streamed or compressed in a way that artifacts do not use"
        )
    is_deflated = info.compress_type == zipfile.ZIP_DEFLATED
    if is_deflated and not info.filename.endswith(_DEFLATED_SUFFIXES):
        raise ArtifactError(f"{where}: is deflated, wanted it stored")
    if not is_deflated and info.file_size != info.compress_size:
        raise ArtifactError(
            f"{where}: found {info.compress_size} bytes, but its size says {info.file_size}"
        )
    limit = _size_limit(info, is_deflated=is_deflated)
    if info.file_size > limit:
        raise ArtifactError(f"{where}: claims {info.file_size} bytes, wanted at most {limit}")
    if is_deflated and info.file_size > MAX_RATIO * info.compress_size:
        raise ArtifactError(
            f"{where}: {info.compress_size} bytes claim to expand to {info.file_size}, wanted at "
            f"most {MAX_RATIO} times as many"
        )
    return Entry(
        info.filename,
        info.header_offset,
        info.compress_size,
        info.file_size,
        is_deflated,
        info.CRC,
    )


def _size_limit(info: zipfile.ZipInfo, *, is_deflated: bool) -> int:
    if info.filename == MANIFEST:
        return MAX_MANIFEST_BYTES
    return MAX_TEXT_BYTES if is_deflated else MAX_ENTRY_BYTES


def _check_tiling(stream: BinaryIO, entries: Iterable[Entry], end: int, path: Path) -> None:
    position = 0
    for entry in sorted(entries, key=lambda e: e.offset):
        if entry.offset != position:
            raise ArtifactError(
                f"{path}: entry {entry.name} begins at byte {entry.offset}, wanted {position}; "
                "bytes were inserted, removed or overlap"
            )
        where = f"{path}, entry {entry.name}"
        position = _data_offset(stream, entry, where) + entry.stored_bytes
    if position != end:
        raise ArtifactError(
            f"{path}: the entries end at byte {position}, but the directory begins at {end}; "
            "the file is cut short or was edited"
        )


def _data_offset(stream: BinaryIO, entry: Entry, where: str) -> int:
    stream.seek(entry.offset)
    header = stream.read(_LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(b"PK\x03\x04"):
        raise ArtifactError(f"{where}: its header is missing; damaged or cut short, copy it again")
    _, _, flags, method, _, _, crc, stored_bytes, size, name_bytes, extra = _LOCAL.unpack(header)
    name = stream.read(min(name_bytes, MAX_NAME_BYTES + 1))
    if name != entry.name.encode():
        raise ArtifactError(f"{where}: its header has another name, {name!r}; it was edited")
    is_as_listed = (
        flags == 0
        and (method == zipfile.ZIP_DEFLATED) == entry.is_deflated
        and crc == entry.crc
        and stored_bytes in (entry.stored_bytes, _IN_ZIP64)
        and size in (entry.size, _IN_ZIP64)
        and extra in (0, _ZIP64_FIELD_BYTES)
    )
    if not is_as_listed:
        raise ArtifactError(f"{where}: its header and the directory disagree; it was edited")
    return entry.offset + _LOCAL.size + int(name_bytes) + int(extra)


def _inflate(data: bytes, size: int, where: str) -> bytes:
    machine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        text = machine.decompress(data, size + 1)
    except zlib.error as error:
        raise ArtifactError(f"{where}: cannot be expanded ({error}); copy it again") from error
    if len(text) != size or not machine.eof or machine.unused_data:
        raise ArtifactError(
            f"{where}: does not expand to the {size} bytes that the directory claims; it was edited"
        )
    return text
