"""Files that are damaged, edited or made to hurt: one error a cause, and nothing else happens."""

import hashlib
import io
import json
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tersor.artifact import Artifact, verify_artifact
from tersor.artifact.container import (
    MAX_DIRECTORY_BYTES,
    MAX_ENTRIES,
    MAX_ENTRY_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_RATIO,
    MAX_TEXT_BYTES,
)
from tersor.core.errors import ArtifactError, NoFileError

STRIDE = 13  # bytes of data that are left out between two that are tried, to save time
ENTRIES = [
    "manifest.json",
    "graph.json",
    "weights.safetensors",
    "builds/ov/model.xml",
    "builds/ov/segments.json",
]


def entries_of(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(
    entries: list[tuple[str, bytes]] | dict[str, bytes],
    prepare: Callable[[zipfile.ZipInfo], None] = lambda _info: None,
) -> bytes:
    """A zip as an attacker makes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items() if isinstance(entries, dict) else entries:
            info = zipfile.ZipInfo(name)
            prepare(info)
            archive.writestr(info, data)
    return buffer.getvalue()


def with_hashes(entries: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    """An edited file whose manifest lists the right hashes: an attacker can do that."""
    manifest = json.loads(entries["manifest.json"]) | changes
    others = {name: data for name, data in entries.items() if name != "manifest.json"}
    manifest["sha256"] = {n: hashlib.sha256(d).hexdigest() for n, d in others.items()}
    return {"manifest.json": json.dumps(manifest).encode(), **others}


def directory_field(data: bytes, name: str, offset: int, code: str, value: int) -> bytes:
    """Overwrite one field of an entry's record in the central directory."""
    at = data.index(b"PK\x01\x02")
    while data[at + 46 : at + 46 + len(name)] != name.encode():
        at = data.index(b"PK\x01\x02", at + 4)
    edited = bytearray(data)
    struct.pack_into(code, edited, at + offset, value)
    return bytes(edited)


def end_field(data: bytes, offset: int, code: str, value: int) -> bytes:
    edited = bytearray(data)
    struct.pack_into(code, edited, len(data) - 22 + offset, value)
    return bytes(edited)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], Artifact]:
    def write_and_verify(data: bytes) -> Artifact:
        path = tmp_path / "m.tersor"
        path.write_bytes(data)
        return verify_artifact(path)

    return write_and_verify


def test_the_good_file_is_read(good: bytes, read: Callable[[bytes], Artifact]):
    found = read(good)
    assert found.builds["ov"]["model.bin"] == bytes(range(256)) * 2 + b"tail"
    assert read(pack(with_hashes(entries_of(good)))).graph["nodes"] == ["a", "b"]


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(
        NoFileError, match=r"none\.tersor: cannot read .*No such file.*give the path"
    ) as raised:
        verify_artifact(tmp_path / "none.tersor")
    assert raised.value.exit_code == 2  # a typing error is no tampered file


def test_a_directory(tmp_path: Path):
    with pytest.raises(NoFileError, match=r"cannot read .*Is a directory"):
        verify_artifact(tmp_path)


@pytest.mark.parametrize("data", [b"", b"x", b"\x80\x04K\x01.", b"\x00" * 1000])
def test_what_is_no_zip(data: Any, read: Callable[[bytes], Artifact]):
    with pytest.raises(ArtifactError, match=r"m\.tersor: not a zip file; wanted an artifact"):
        read(data)


def test_a_file_cut_anywhere_is_refused(good: bytes, read: Callable[[bytes], Artifact]):
    for n in (*range(0, len(good), STRIDE), *range(len(good) - 30, len(good))):
        with pytest.raises(ArtifactError):
            read(good[:n])


def test_a_file_cut_short_says_so(good: bytes, read: Callable[[bytes], Artifact]):
    with pytest.raises(ArtifactError, match="is missing; it is cut short, copy it again"):
        read(good[: len(good) // 2])


def test_any_edited_byte_is_found_or_harmless(good: bytes, read: Callable[[bytes], Artifact]):
    """Bytes all over the file in turn: an ArtifactError, or the same content."""
    wanted = entries_of(good)
    n_found = 0
    directory = good.index(b"PK\x01\x02")
    places = [*range(40), *range(40, directory, STRIDE), *range(directory, len(good))]
    for at in places:
        edited = bytearray(good)
        edited[at] ^= 0x5A
        try:
            found = read(bytes(edited))
        except ArtifactError:
            n_found += 1
            continue
        assert json.loads(wanted["graph.json"]) == dict(found.graph)
        assert bytes(found.tensors["w"].data) == bytes(range(256)) * 2
        assert found.builds["ov"]["model.xml"] == wanted["builds/ov/model.xml"]
    # What may change unnoticed are times and attributes in the zip's own headers.
    assert n_found > 0.8 * len(places)


@pytest.mark.parametrize("name", ENTRIES)
def test_an_edited_byte_in_an_entry_is_refused(
    name: str, good: bytes, read: Callable[[bytes], Artifact]
):
    """With checksums of the zip mended, as an editor of archives does it."""
    entries = entries_of(good)
    data = bytearray(entries[name])
    data[len(data) // 2] ^= 1
    entries[name] = bytes(data)
    with pytest.raises(ArtifactError, match=name if name != "manifest.json" else "manifest|sha"):
        read(pack(entries))


@pytest.mark.parametrize("name", ENTRIES[1:])
def test_a_hash_that_does_not_fit_names_the_entry_and_both_hashes(
    name: str, good: bytes, read: Callable[[bytes], Artifact]
):
    entries = entries_of(good)
    manifest = json.loads(entries["manifest.json"])
    manifest["sha256"][name] = "0" * 64
    entries["manifest.json"] = json.dumps(manifest).encode()
    with pytest.raises(
        ArtifactError, match=rf"entry {name}: found SHA-256 \w{{16}}\.\.\., wanted 0000"
    ):
        read(pack(entries))


def test_a_damaged_manifest_fails_its_checksum(good: bytes, read: Callable[[bytes], Artifact]):
    at = good.index(b"manifest.json") + len("manifest.json") + 40
    edited = bytearray(good)
    edited[at] ^= 1
    with pytest.raises(
        ArtifactError, match=r"entry manifest\.json: (its checksum|cannot be|does not)"
    ):
        read(bytes(edited))


def test_an_edited_manifest_that_is_still_one_fails_its_checksum(good: bytes, read: Any):
    data = pack(entries_of(good))
    assert data.count(b'"now"') == 1
    refused(
        read, data.replace(b'"now"', b'"not"'), r"entry manifest\.json: its checksum does not fit"
    )


@pytest.mark.parametrize("name", ENTRIES[:3])
def test_a_missing_entry(name: str, good: bytes, read: Callable[[bytes], Artifact]):
    entries = entries_of(good)
    del entries[name]
    with pytest.raises(ArtifactError, match=rf"entries \['{name}'\] are missing"):
        read(pack(entries))


def test_a_missing_build_entry(good: bytes, read: Callable[[bytes], Artifact]):
    entries = entries_of(good)
    del entries["builds/ov/model.xml"]
    with pytest.raises(ArtifactError, match=r"lists \['builds/ov/model.xml'\] that are not there"):
        read(pack(entries))


def test_an_entry_that_the_manifest_does_not_list(good: bytes, read: Callable[[bytes], Artifact]):
    entries = entries_of(good) | {"builds/ov/extra.bin": b"x"}
    with pytest.raises(ArtifactError, match=r"does not list \['builds/ov/extra.bin'\]"):
        read(pack(entries))


def test_a_backend_that_the_manifest_does_not_name(good: bytes, read: Callable[[bytes], Artifact]):
    entries = with_hashes(entries_of(good) | {"builds/evil/code.bin": b"x"})
    with pytest.raises(ArtifactError, match=r"found builds for \['evil', 'ov'\], but the manifest"):
        read(pack(entries))


def test_a_choice_for_another_backend(good: bytes, read: Callable[[bytes], Artifact]):
    choices = {"ov": {"backend": "evil"}}
    with pytest.raises(ArtifactError, match="the choice for ov names backend 'evil'"):
        read(pack(with_hashes(entries_of(good), choices=choices)))


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd", "/etc/passwd", "builds/../../x", "builds/ov/..", "..\\x", "C:x",
        "builds\\ov\\x", "\\\\host\\x",
    ],
)  # fmt: skip
def test_a_name_that_leaves_the_file(
    name: str, good: bytes, read: Callable[[bytes], Artifact], tmp_path: Path
):
    with pytest.raises(ArtifactError, match="points outside of the file; do not trust it"):
        read(pack([*entries_of(good).items(), (name, b"x")]))
    assert [p.name for p in tmp_path.iterdir()] == ["m.tersor"]


@pytest.mark.parametrize(
    "name",
    ["readme.txt", "builds/x", "builds/ov/a/b", "builds/ov/", "builds/OV/x", "builds/ov/.hidden",
     "builds/ov/a\x00.xml", "weights.pkl", "builds/ov/" + "x" * 200, "GRAPH.JSON"],
)  # fmt: skip
def test_an_unknown_entry(name: str, good: bytes, read: Callable[[bytes], Artifact]):
    data = pack([*entries_of(good).items(), (name.replace("\x00", "\x01"), b"x")])
    if "\x00" in name:  # zipfile cuts a name at a null byte; the file may hold one all the same
        data = data.replace(b"a\x01.xml", b"a\x00.xml")
    with pytest.raises(ArtifactError, match=r"is unknown; wanted manifest.json, graph.json"):
        read(data)


def test_an_entry_that_is_there_twice(good: bytes, read: Callable[[bytes], Artifact]):
    entries = [*entries_of(good).items()]
    with pytest.warns(UserWarning, match="Duplicate name"):
        data = pack([*entries, ("graph.json", b'{"nodes": []}')])
    with pytest.raises(ArtifactError, match=r"entry graph\.json is there twice"):
        read(data)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version(version: Any, good: bytes, read: Callable[[bytes], Artifact]):
    with pytest.raises(ArtifactError, match=f"found format version {version!r}, wanted 1; read it"):
        read(pack(with_hashes(entries_of(good), format=version)))


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (b"", "is not JSON"),
        (b"\x80\x04K\x01.", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b"[1]", "found a list, wanted an object"),
    ],
)
def test_a_graph_that_is_none(
    graph: Any, message: str, good: bytes, read: Callable[[bytes], Artifact]
):
    with pytest.raises(ArtifactError, match=rf"entry graph\.json:? {message}"):
        read(pack(with_hashes(entries_of(good) | {"graph.json": graph})))


@pytest.mark.parametrize("offsets", [[0, 10**9], [-8, 0], [4, 516], [0, 100], [512, 0]])
def test_weights_whose_header_lies_about_offsets(
    offsets: Any, good: bytes, read: Callable[[bytes], Artifact]
):
    entries = entries_of(good)
    header = {"w": {"dtype": "U8", "shape": [512], "data_offsets": offsets}}
    text = json.dumps(header).encode()
    weights = struct.pack("<Q", len(text)) + text + bytes(512)
    with pytest.raises(ArtifactError, match=r"entry weights\.safetensors, tensor 'w': .*found"):
        read(pack(with_hashes(entries | {"weights.safetensors": weights})))


def test_weights_whose_header_claims_more_than_the_file(
    good: bytes, read: Callable[[bytes], Artifact]
):
    weights = struct.pack("<Q", 2**62) + b"{}"
    with pytest.raises(ArtifactError, match=f"the header claims {2**62} bytes, wanted at most 2"):
        read(pack(with_hashes(entries_of(good) | {"weights.safetensors": weights})))


def test_segments_that_refer_to_nothing(good: bytes, read: Callable[[bytes], Artifact]):
    segments = json.dumps({"size": 4, "segments": [[0, 4, "gone"]]}).encode()
    with pytest.raises(ArtifactError, match=r"builds/ov/segments\.json: refers to a tensor 'gone'"):
        read(pack(with_hashes(entries_of(good) | {"builds/ov/segments.json": segments})))


def peak_bytes(action: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bomb(n: int, claimed: int | None = None) -> tuple[bytes, int]:
    """Deflated zeros in graph.json, with any claim about their number."""
    machine = zlib.compressobj(9, zlib.DEFLATED, -15)
    return machine.compress(b"0" * n) + machine.flush(), n if claimed is None else claimed


def deflate(info: zipfile.ZipInfo) -> None:
    info.compress_type = zipfile.ZIP_DEFLATED


def refused(read: Callable[[bytes], Artifact], data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        read(data)


def test_a_zip_bomb_is_refused_by_its_ratio_before_it_is_expanded(
    good: bytes, read: Callable[[bytes], Artifact]
):
    entries = with_hashes(entries_of(good) | {"graph.json": b"0" * 10**8})
    data = pack(entries, deflate_text)
    message = rf"\d+ bytes claim to expand to 100000000, wanted at most {MAX_RATIO} times"
    assert peak_bytes(lambda: refused(read, data, message)) < 10**7


def deflate_text(info: zipfile.ZipInfo) -> None:
    if not info.filename.endswith((".safetensors", ".bin")):
        deflate(info)


def test_a_zip_bomb_that_lies_about_its_size_is_cut_off(
    good: bytes, read: Callable[[bytes], Artifact]
):
    entries = with_hashes(entries_of(good) | {"graph.json": b"0" * 10**8})
    data = pack(entries, deflate_text)
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        name_at = 46 if signature == b"PK\x01\x02" else 30
        at = data.index(signature)
        while data[at + name_at : at + name_at + 10] != b"graph.json":
            at = data.index(signature, at + 4)
        data = data[: at + offset] + struct.pack("<L", 1000) + data[at + offset + 4 :]
    message = r"entry graph\.json: does not expand to the 1000 bytes that the directory claims"
    assert peak_bytes(lambda: refused(read, data, message)) < 10**7


@pytest.mark.parametrize(
    ("name", "size", "limit"),
    [
        ("manifest.json", MAX_MANIFEST_BYTES + 1, MAX_MANIFEST_BYTES),
        ("graph.json", MAX_TEXT_BYTES + 1, MAX_TEXT_BYTES),
    ],
)
def test_an_absurd_size_of_a_text(
    name: str, size: Any, limit: Any, good: bytes, read: Callable[[bytes], Artifact]
):
    data = directory_field(pack(entries_of(good), deflate_text), name, 24, "<L", size)
    refused(read, data, rf"entry {name}: claims {size} bytes, wanted at most {limit}")


def test_an_absurd_size_of_a_stored_entry(good: bytes, read: Callable[[bytes], Artifact]):
    entries = entries_of(good)

    def absurd(info: zipfile.ZipInfo) -> None:
        if info.filename == "weights.safetensors":
            # A zip64 field for sizes beyond 4 GB.
            sizes = (MAX_ENTRY_BYTES + 1, MAX_ENTRY_BYTES + 1)
            info.extra = struct.pack("<HHQQ", 1, 16, *sizes)

    data = pack(entries, absurd)
    for offset in (20, 24):
        data = directory_field(data, "weights.safetensors", offset, "<L", 0xFFFFFFFF)
    refused(read, data, f"claims {MAX_ENTRY_BYTES + 1} bytes, wanted at most {MAX_ENTRY_BYTES}")


def test_a_stored_entry_that_claims_more_than_the_file_has(
    good: bytes, read: Callable[[bytes], Artifact]
):
    data = good
    for offset in (20, 24):
        data = directory_field(data, "weights.safetensors", offset, "<L", 10**9)
    message = "its header and the directory disagree"
    assert peak_bytes(lambda: refused(read, data, message)) < 10**7


def test_a_stored_entry_with_two_sizes(good: bytes, read: Callable[[bytes], Artifact]):
    data = directory_field(good, "weights.safetensors", 24, "<L", 5)
    refused(read, data, r"entry weights\.safetensors: found \d+ bytes, but its size says 5")


def test_too_many_entries(good: bytes, read: Callable[[bytes], Artifact]):
    extra = {f"builds/ov/x{i}": b"" for i in range(MAX_ENTRIES)}
    data = pack(entries_of(good) | extra)
    refused(read, data, rf"claims {MAX_ENTRIES + 5} entries .* wanted at most {MAX_ENTRIES} in")


def test_an_absurd_directory(good: bytes, read: Callable[[bytes], Artifact]):
    data = end_field(good, 12, "<L", MAX_DIRECTORY_BYTES + 1)
    refused(read, data, f"entries in {MAX_DIRECTORY_BYTES + 1} bytes, wanted at most")


def test_a_directory_larger_than_the_file(good: bytes, read: Callable[[bytes], Artifact]):
    data = end_field(good, 12, "<L", len(good))
    refused(read, data, "the directory is larger than the file")


def test_a_directory_of_garbage(good: bytes, read: Callable[[bytes], Artifact]):
    start = good.index(b"PK\x01\x02")
    data = good[:start] + bytes(len(good) - 22 - start) + good[-22:]
    refused(read, data, r"damaged directory \(.*\); copy it again")


@pytest.mark.parametrize("at", ["front", "middle", "before the directory"])
def test_bytes_between_the_entries(at: Any, good: bytes, read: Callable[[bytes], Artifact]):
    """A second file hidden in the first: another program may read that one."""
    where = {
        "front": 0,
        "middle": good.index(b"PK\x03\x04", 4),
        "before the directory": good.index(b"PK\x01\x02"),
    }[at]
    data = good[:where] + b"hidden" + good[where:]
    refused(read, data, "begins at byte|its header is missing|the entries end at byte|damaged")


def test_bytes_before_the_directory_with_its_offset_mended(good: bytes, read: Any):
    start = good.index(b"PK\x01\x02")
    data = end_field(good[:start] + b"hidden" + good[start:], 16, "<L", start + 6)
    refused(read, data, f"the entries end at byte {start}, but the directory begins at {start + 6}")


def test_a_comment_is_no_place_to_hide(good: bytes, read: Callable[[bytes], Artifact]):
    refused(read, end_field(good, 20, "<H", 5), "has a zip comment")
    refused(read, end_field(good, 20, "<H", 5) + b"hello", "is cut short")


def test_overlapping_entries(good: bytes, read: Callable[[bytes], Artifact]):
    """Many names for one piece of data: small file, large content."""
    first = good.index(b"PK\x03\x04", 4)
    data = directory_field(good, "weights.safetensors", 42, "<L", first)
    refused(read, data, r"begins at byte \d+, wanted \d+|header has another name")


def test_a_name_that_differs_between_header_and_directory(
    good: bytes, read: Callable[[bytes], Artifact]
):
    at = good.index(b"graph.json")
    refused(read, good[:at] + b"gnaph.json" + good[at + 10 :], "its header has another name")


@pytest.mark.parametrize(
    ("offset", "value"),
    [(8, 1), (8, 8), (10, zipfile.ZIP_LZMA)],
    ids=["encrypted", "streamed", "lzma"],
)
def test_ways_of_packing_that_artifacts_do_not_use(
    offset: Any, value: Any, good: bytes, read: Callable[[bytes], Artifact]
):
    data = directory_field(good, "weights.safetensors", offset, "<H", value)
    refused(read, data, "encrypted, streamed or compressed in a way that artifacts do not use")


def test_deflated_weights(good: bytes, read: Callable[[bytes], Artifact]):
    refused(read, pack(entries_of(good), deflate), "is deflated, wanted it stored")


def test_a_deflated_entry_of_garbage(good: bytes, read: Callable[[bytes], Artifact]):
    data = pack(entries_of(good), deflate_text)
    at = data.index(b"graph.json") + len("graph.json")
    refused(
        read, data[:at] + b"\xff\xff" + data[at + 2 :], r"entry graph\.json: cannot be expanded"
    )


def test_no_pickle_is_read_anywhere():
    """The code that reads files does not know how to execute one."""
    import tersor.artifact

    folder = Path(tersor.artifact.__file__).parent
    for path in folder.glob("*.py"):
        text = path.read_text()
        assert not any(word in text for word in ("import pickle", "eval(", "exec(", "marshal"))
