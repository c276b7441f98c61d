"""Our safetensors against the package's, and one error a cause."""

import json
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tersor.artifact.tensors import RawTensor, read_safetensors, write_safetensors
from tersor.core.errors import ArtifactError, ShapeError

ARRAYS = hnp.arrays(
    dtype=st.sampled_from(
        ["bool", "uint8", "int8", "uint16", "int16", "float16", "uint32", "int32", "float32",
         "uint64", "int64", "float64"]
    ),
    shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)  # fmt: skip
MANY = st.dictionaries(st.text(max_size=8).filter(lambda n: n != "__metadata__"), ARRAYS)


def raw(arrays: Any) -> Any:
    return {name: RawTensor.from_numpy(array) for name, array in arrays.items()}


def same(found: Any, wanted: Any) -> Any:
    return (
        found.dtype == wanted.dtype
        and found.shape == wanted.shape
        and found.tobytes() == wanted.tobytes()
    )


@given(MANY)
def test_the_package_reads_what_we_write(arrays: Any):
    found = safetensors.numpy.load(write_safetensors(raw(arrays)))
    assert found.keys() == arrays.keys()
    assert all(same(found[name], array) for name, array in arrays.items())


@given(MANY)
def test_we_read_what_the_package_writes(arrays: Any):
    contiguous = {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()}
    found = read_safetensors(safetensors.numpy.save(contiguous, {"format": "np"}), "w")
    assert found.keys() == arrays.keys()
    assert all(same(found[name].to_numpy(), array) for name, array in arrays.items())


@given(MANY)
def test_the_bytes_depend_on_the_content_alone(arrays: Any):
    tensors = raw(arrays)
    backwards = dict(reversed(tensors.items()))
    assert write_safetensors(tensors) == write_safetensors(backwards)


def test_golden_bytes():
    """The widest type comes first, so that all tensors are aligned; the header is padded to 8."""
    tensors = {
        "a": RawTensor("int8", (2,), b"\x01\x02"),
        "b": RawTensor("bfloat16", (1,), b"\x80?"),
    }
    header = (
        b'{"b":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},'
        b'"a":{"dtype":"I8","shape":[2],"data_offsets":[2,4]}}     '
    )
    assert write_safetensors(tensors) == b"\x70" + bytes(7) + header + b"\x80?\x01\x02"


def test_reading_copies_nothing():
    data = write_safetensors({"a": RawTensor("uint8", (3,), b"abc")})
    tensor = read_safetensors(data, "w")["a"]
    assert isinstance(tensor.data, memoryview)
    assert tensor.data.obj is data
    assert not tensor.to_numpy().flags.writeable


def test_types_that_numpy_lacks_stay_raw():
    tensor = RawTensor("bfloat16", (2,), b"\x80?\x00@")
    assert read_safetensors(write_safetensors({"a": tensor}), "w")["a"].data == tensor.data
    with pytest.raises(ShapeError, match=r"NumPy has no bfloat16; read \.data"):
        tensor.to_numpy()


def test_big_endian_arrays_are_turned():
    assert RawTensor.from_numpy(np.array([1], dtype=">i4")).data == b"\x01\0\0\0"


@pytest.mark.parametrize(
    ("dtype", "shape", "data", "message"),
    [
        ("int3", (1,), b"1", "dtype 'int3' is not stored; known are"),
        ("float32", (2,), b"1234", r"float32 tensor of shape \(2,\): found 4 bytes, wanted 8"),
        ("int8", (-1, -1), b"1", r"shape \(-1, -1\): wanted at most 64 sizes of 0 or more"),
        ("int8", (1,) * 65, b"1", "wanted at most 64 sizes"),
        ("int8", (2**62, 2**62), b"", "found 0 bytes, wanted 21267647932558653966460912964485513216"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_none_is_refused(dtype: Any, shape: Any, data: Any, message: str):
    with pytest.raises(ShapeError, match=message):
        RawTensor(dtype, shape, data)


def file_of(header: Any, body: Any = b"12345678") -> Any:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(begin: Any = 0, end: Any = 8, dtype: Any = "U8", shape: Any = None) -> Any:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape,
            "data_offsets": [begin, end]}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "w: found 0 bytes, wanted a header of 8 or more"),
        (b"\xff" * 8, "w: the header claims 18446744073709551615 bytes, wanted at most 0"),
        (b"\x09" + b"\0" * 7 + b"{}      ", "claims 9 bytes, wanted at most 8; the file is cut"),
        (file_of(b"nonsense"), "w: the header is not JSON"),
        (file_of(b"\xff\xff"), "w: the header is not JSON"),
        (file_of(b"[" * 100_000), "w: the header is not JSON"),
        (file_of([]), "w: the header is a list, wanted an object"),
        (file_of({"a": 1}), "w, tensor 'a': wanted an object with dtype, shape and data_offsets"),
        (file_of({"a": entry() | {"x": 1}}), "tensor 'a': wanted an object with dtype"),
        (file_of({"a": entry(dtype="F3")}), "tensor 'a': found dtype 'F3', wanted one of"),
        (file_of({"a": entry(dtype=3)}), "tensor 'a': found dtype 3"),
        (file_of({"a": entry(shape=["8"])}), "wanted shape and data_offsets as lists of integers"),
        (file_of({"a": entry(shape=[8.0])}), "wanted shape and data_offsets as lists"),
        (file_of({"a": entry() | {"data_offsets": [0]}}), "wanted shape and data_offsets"),
        (file_of({"a": entry(end=9)}), r"found offsets \[0, 9\], wanted them inside of the 8"),
        (file_of({"a": entry(begin=-1)}), r"found offsets \[-1, 8\], wanted them inside"),
        (file_of({"a": entry(begin=6, end=2, shape=[0])}), r"found offsets \[6, 2\]"),
        (file_of({"a": entry(shape=[7])}), r"shape \(7,\): found 8 bytes, wanted 7"),
        (file_of({"a": entry(dtype="F32")}), r"shape \(8,\): found 8 bytes, wanted 32"),
        (file_of({"a": entry(shape=[2**70, 0, 1])}), "found 8 bytes, wanted 0"),
        (file_of({"a": entry(0, 4), "b": entry(2, 8)}), "found a tensor at byte 2 .*, wanted it at 4"),
        (file_of({"a": entry(0, 4), "b": entry(5, 8)}), "byte 5 .*, wanted it at 4"),
        (file_of({"a": entry(0, 7)}), "the tensors end at byte 7 of the data, but it has 8"),
        (file_of({}), "the tensors end at byte 0 of the data, but it has 8"),
    ],
)  # fmt: skip
def test_a_lying_header_is_refused(data: Any, message: str):
    with pytest.raises(ArtifactError, match=message):
        read_safetensors(data, "w")


def test_the_header_is_bounded_before_it_is_read(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tersor.artifact.tensors.MAX_HEADER_BYTES", 16)
    with pytest.raises(ArtifactError, match="claims 20 bytes, wanted at most 16"):
        read_safetensors(file_of(b" " * 20), "w")
