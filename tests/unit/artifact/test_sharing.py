import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tersor.artifact.sharing import (
    MAX_EXPANSION,
    MAX_EXPANSION_SLACK,
    MIN_SHARED_BYTES,
    rebuild_segments,
    share_segments,
)
from tersor.artifact.tensors import RawTensor
from tersor.core.errors import ArtifactError

RNG = np.random.default_rng(0)


def noise(n: int) -> Any:
    return RNG.bytes(n)


def sections_of(block: Any, segments: Any) -> Any:
    return {
        "model.xml": b"<x/>",
        "model.bin": block,
        "segments.json": json.dumps(segments).encode(),
    }


def tensor(data: Any) -> Any:
    return RawTensor("uint8", (len(data),), data)


def test_weights_of_the_graph_are_not_stored_again():
    weight, scale, own = noise(4096), noise(512), noise(1000)
    block = weight + own + scale
    segments = [[0, 4096], [4096, 1000], [5096, 512]]
    tensors = {"fc.codes": tensor(weight), "fc.scale": RawTensor("float32", (128,), scale)}
    stored, added = share_segments(sections_of(block, segments), tensors, "ov")
    assert stored.keys() == {"model.xml", "segments.json"}
    assert added == {"builds.ov.0": tensor(own)}
    assert json.loads(stored["segments.json"]) == {
        "size": 5608,
        "segments": [[0, 4096, "fc.codes"], [4096, 1000, "builds.ov.0"], [5096, 512, "fc.scale"]],
    }
    rebuilt = rebuild_segments(stored, tensors | added)
    assert rebuilt["model.bin"] == block
    assert rebuilt["model.xml"] == b"<x/>"
    assert json.loads(rebuilt["segments.json"]) == segments


def test_one_block_used_twice_is_stored_once():
    own = noise(1000)
    sections = sections_of(own + own, [[0, 1000], [1000, 1000]])
    stored, added = share_segments(sections, {}, "ov")
    assert added == {"builds.ov.0": tensor(own)}
    assert rebuild_segments(stored, added)["model.bin"] == own + own


def test_small_constants_stay_together():
    n = 1000
    block = noise(4 * n)
    segments = [[4 * i, 4] for i in range(n)]
    stored, added = share_segments(sections_of(block, segments), {}, "ov")
    assert added == {"builds.ov.0": tensor(block)}
    assert len(stored["segments.json"]) < 100


def test_gaps_belong_to_the_block():
    block = noise(3000)
    tensors = {"w": tensor(block[1000:2000])}
    stored, added = share_segments(sections_of(block, [[1000, 1000]]), tensors, "ov")
    assert [len(t.data) for t in added.values()] == [1000, 1000]
    assert rebuild_segments(stored, tensors | added)["model.bin"] == block


@given(
    st.lists(st.integers(0, 2 * MIN_SHARED_BYTES), max_size=12),
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.randoms(use_true_random=False),
)
def test_rebuild_is_the_inverse_of_share(sizes: Any, is_weight: Any, is_listed: Any, random: Any):
    pieces = [random.choice([bytes([i]), b"\0"]) * size for i, size in enumerate(sizes, 1)]
    offsets = np.cumsum([0, *sizes])[:-1].tolist()
    tensors = {
        f"w{i}": tensor(p) for i, (p, yes) in enumerate(zip(pieces, is_weight, strict=False)) if yes
    }
    segments = [[o, len(p)] for o, p, yes in zip(offsets, pieces, is_listed, strict=False) if yes]
    random.shuffle(segments)
    sections = sections_of(b"".join(pieces), segments)
    stored, added = share_segments(sections, tensors, "ov")
    rebuilt = rebuild_segments(stored, tensors | added)
    assert rebuilt["model.bin"] == sections["model.bin"]
    # Sharing what was rebuilt gives the same file.
    assert share_segments(rebuilt, tensors, "ov") == (stored, added)


@pytest.mark.parametrize("missing", ["model.bin", "segments.json"])
def test_sections_without_segments_stay_as_they_are(missing: Any):
    sections = sections_of(b"1234", [[0, 4]])
    del sections[missing]
    assert share_segments(sections, {}, "ov") == (sections, {})
    if missing == "segments.json":
        assert rebuild_segments(sections, {}) == sections


def test_an_empty_block():
    stored, added = share_segments(sections_of(b"", [[0, 0]]), {}, "ov")
    assert added == {}
    assert rebuild_segments(stored, {})["model.bin"] == b""


def test_what_no_reader_would_expand_is_stored_as_it_is():
    one = b"x" * MIN_SHARED_BYTES
    n = (MAX_EXPANSION * len(one) + MAX_EXPANSION_SLACK) // len(one) + 1
    sections = sections_of(one * n, [[i * len(one), len(one)] for i in range(n)])
    assert share_segments(sections, {}, "ov") == (sections, {})


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([[0, 9]], r"found a constant at \[0, 9\], wanted it after byte 0 and inside of the 8"),
        ([[0, 5], [4, 4]], r"found a constant at \[4, 8\], wanted it after byte 5"),
        ([[-1, 2]], r"found a segment \[-1, 2\], wanted \[offset, size\]"),
        ([[0]], r"found a segment \[0\]"),
        ([[0, True]], "found a segment"),
        ({}, "wanted a list of at most"),
    ],
)
def test_a_backend_that_lists_nonsense_is_refused(segments: Any, message: str):
    with pytest.raises(ArtifactError, match=message):
        share_segments(sections_of(b"12345678", segments), {}, "ov")


def stored_of(content: Any) -> Any:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return {"model.xml": b"", "segments.json": data}


TENSORS = {"a": tensor(b"1234"), "b": tensor(b"56")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "b/segments.json is not JSON"),
        (b"[" * 100_000, "b/segments.json is not JSON"),
        ([], "b/segments.json: wanted an object with size and segments"),
        ({"size": 4}, "wanted an object with size and segments"),
        ({"size": "4", "segments": []}, "found size '4', wanted an integer"),
        ({"size": 4, "segments": [[0, 4]]}, r"found a segment \[0, 4\], wanted .*tensor name"),
        ({"size": 4, "segments": [[0, 4, "z"]]}, "refers to a tensor 'z' that is not in the file"),
        ({"size": 4, "segments": [[0, 4, 7]]}, "refers to a tensor 7"),
        (
            {"size": 4, "segments": [[0, 4, "b"]]},
            "found 4 bytes at 0 from tensor 'b', wanted its 2",
        ),
        ({"size": 6, "segments": [[0, 4, "a"], [3, 2, "b"]]}, "found 2 bytes at 3 .* bytes at 4"),
        ({"size": 7, "segments": [[0, 4, "a"], [5, 2, "b"]]}, "found 2 bytes at 5 .* bytes at 4"),
        ({"size": 9, "segments": [[0, 4, "a"]]}, "the segments end at 4, wanted size 9"),
    ],
)
def test_references_that_do_not_fit_are_refused(content: Any, message: str):
    with pytest.raises(ArtifactError, match=message):
        rebuild_segments(stored_of(content), TENSORS, "b")


def test_a_block_out_of_proportion_is_refused_before_it_is_made():
    big = {"a": tensor(bytes(10**6))}
    references = [[i * 10**6, 10**6, "a"] for i in range(100_000)]
    content = {"size": 10**11, "segments": references}
    with pytest.raises(ArtifactError, match="claims a block of 100000000000 bytes, wanted at most"):
        rebuild_segments(stored_of(content), big)
