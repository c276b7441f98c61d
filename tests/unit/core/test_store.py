import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tersor.core.errors import StoreError
from tersor.core.store import Store, write_atomic


@dataclass(frozen=True, kw_only=True)
class Record:
    x: int


def everything_under(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


def no_space(*_args: Any, **_kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_write_atomic_replaces_a_file(tmp_path: Path):
    path = tmp_path / "f"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert everything_under(tmp_path) == ["f"]


@pytest.mark.parametrize("step", ["fsync", "replace", "mkstemp"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    path = tmp_path / "f"
    write_atomic(path, b"old")
    targets = {
        "fsync": "os.fsync",
        "replace": "pathlib.Path.replace",
        "mkstemp": "tempfile.mkstemp",
    }
    monkeypatch.setattr(targets[step], no_space)
    with pytest.raises(StoreError, match=r"f: cannot write \(No space left on device\); give"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert everything_under(tmp_path) == ["f"]


def test_write_atomic_into_a_missing_directory(tmp_path: Path):
    with pytest.raises(StoreError, match=r"cannot write.*No such file or directory"):
        write_atomic(tmp_path / "absent" / "f", b"")


def test_round_trip(tmp_path: Path):
    store = Store(tmp_path)
    arrays = {"a": np.arange(6, dtype=np.int8).reshape(2, 3), "b": np.float32([1.5, np.inf])}
    assert not store.has("price", "k")
    assert store.get(Record, "price", "k") is None
    assert store.arrays("price", "k") == {}
    store.put("price", "k", Record(x=3), arrays)
    assert store.has("price", "k")
    assert store.get(Record, "price", "k") == Record(x=3)
    found = store.arrays("price", "k")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert store.get(Record, "plan", "k") is None


def test_putting_again_replaces_the_whole_entry(tmp_path: Path):
    store = Store(tmp_path)
    store.put("s", "k", Record(x=1), {"a": np.zeros(2)})
    store.put("s", "k", Record(x=2))
    assert store.get(Record, "s", "k") == Record(x=2)
    assert store.arrays("s", "k") == {}


def test_removing_forgets(tmp_path: Path):
    store = Store(tmp_path)
    store.put("s", "k", Record(x=1))
    store.remove("s", "k")
    store.remove("s", "k")
    assert not store.has("s", "k")


@pytest.mark.parametrize("content", ["", "{", '{"x": "no"}', '{"y": 1}', "\x00", "[1]"])
def test_a_damaged_entry_counts_as_none_and_goes(tmp_path: Path, content: Any):
    store = Store(tmp_path)
    store.put("s", "k", Record(x=1))
    (tmp_path / "s" / "k" / "record.json").write_text(content)
    assert store.get(Record, "s", "k") is None
    assert not store.has("s", "k")
    store.put("s", "k", Record(x=2))
    assert store.get(Record, "s", "k") == Record(x=2)


def test_bytes_that_are_no_text_count_as_none(tmp_path: Path):
    store = Store(tmp_path)
    store.put("s", "k", Record(x=1))
    (tmp_path / "s" / "k" / "record.json").write_bytes(b"\xff\xfe{}")
    assert store.get(Record, "s", "k") is None


def test_damaged_arrays_count_as_none(tmp_path: Path):
    store = Store(tmp_path)
    store.put("s", "k", Record(x=1), {"a": np.zeros(100)})
    path = tmp_path / "s" / "k" / "arrays.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(StoreError, match=r"arrays\.safetensors: cannot read .*delete it"):
        store.arrays("s", "k")
    assert store.get(Record, "s", "k") is None
    assert not store.has("s", "k")


@pytest.mark.parametrize("step", ["write_bytes", "write_text", "rename"])
def test_a_full_disk_leaves_no_partial_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    store = Store(tmp_path)
    monkeypatch.setattr(Path, step, no_space)
    with pytest.raises(StoreError, match=r"cannot keep stage s .*No space left.*cache_dir="):
        store.put("s", "k", Record(x=1), {"a": np.zeros(2)})
    monkeypatch.undo()
    assert not store.has("s", "k")
    assert everything_under(tmp_path) == ["s"]


def test_a_full_disk_keeps_the_old_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(tmp_path)
    store.put("s", "k", Record(x=1))
    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(StoreError):
        store.put("s", "k", Record(x=2))
    assert store.get(Record, "s", "k") == Record(x=1)


def test_a_file_where_the_directory_should_be(tmp_path: Path):
    path = tmp_path / "cache"
    path.write_text("precious")
    with pytest.raises(StoreError, match=r"cache: cannot write .*pass cache_dir="):
        Store(path)
    assert path.read_text() == "precious"


def test_a_read_only_directory_is_found_out_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def read_only(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", read_only)
    with pytest.raises(StoreError, match=r"Read-only file system.*pass cache_dir="):
        Store(tmp_path)
    assert everything_under(tmp_path) == []


def test_an_entry_that_cannot_be_read_is_an_error_not_a_miss(tmp_path: Path):
    store = Store(tmp_path)
    (tmp_path / "s" / "k" / "record.json").mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot read"):
        store.get(Record, "s", "k")


def test_two_processes_that_write_one_entry_leave_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The other one's entry appears between this one's look and its rename, once or always."""
    store, other = Store(tmp_path), Store(tmp_path)
    rename, times = Path.rename, [1]

    def overtaken(self: Path, target: Path) -> Path:
        if target.name == "k" and times[0] > 0:
            times[0] -= 1
            with monkeypatch.context() as patch:
                patch.setattr(Path, "rename", rename)
                other.put("s", "k", Record(x=2), {"a": np.zeros(2)})
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", overtaken)
    for number in (1, 1000):
        times[0] = number
        store.put("s", "k", Record(x=2), {"a": np.zeros(2)})
        assert store.get(Record, "s", "k") == Record(x=2)
        assert everything_under(tmp_path) == [
            "s", "s/k", "s/k/arrays.safetensors", "s/k/record.json"
        ]  # fmt: skip


def test_what_a_killed_process_was_writing_goes_with_the_next_store(tmp_path: Path):
    from tersor.core import store

    Store(tmp_path).put("plan", "k", Record(x=1))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    own = store._prefix("key")
    names = {
        own.replace(str(os.getpid()), str(ended.pid)) + "abc": False,
        own + "abc": True,  # is being written
        f".key-00000000-{ended.pid}-abc": True,  # on another host, which may share the folder
        ".notes": True,
    }
    for name in names:
        (tmp_path / "plan" / name).mkdir()
        (tmp_path / "plan" / name / "record.json").write_text("{")
    found = Store(tmp_path)
    assert {name: (tmp_path / "plan" / name).exists() for name in names} == names
    assert found.get(Record, "plan", "k") == Record(x=1)


def test_many_may_open_a_store_at_a_time(tmp_path: Path) -> None:
    """What one makes and removes while another looks around is no error."""
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(Store, [tmp_path] * 800))
    assert len(stores) == 800
    assert list(tmp_path.iterdir()) == []
