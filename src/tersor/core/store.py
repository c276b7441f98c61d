"""The content-addressed store: a finished stage is found again by the hash of what it read.

Layout: ``<root>/<stage>/<key>/record.json`` with optional ``arrays.safetensors`` beside it. An
entry appears by one rename, so a killed process leaves either a whole entry or none, and at most a
hidden folder, which the next one to open the store removes.
"""

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from tersor.core.errors import ConfigError, StoreError
from tersor.core.jsonable import dumps, from_json

RecordT = TypeVar("RecordT")
Arrays = Mapping[str, NDArray[Any]]
_TEMPORARY = re.compile(r"\..+-(?P<host>[0-9a-f]{8})-(?P<process>\d+)-[^-]+$")
_TRIES = 5  # to replace an entry that other processes replace at the same time


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, then one rename.

    Raises:
        StoreError: The directory can't be written or is full; no partial file stays.
    """
    path = Path(path)
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o666 & ~_umask())  # mkstemp makes files for the owner alone
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise StoreError(
            f"{path}: cannot write ({error.strerror or error}); "
            "give a directory that is writable and has room"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace(fresh: Path, entry: Path) -> None:
    """Put a folder in the place of an entry, or where none is; each step is one rename.

    Several processes may write one entry at a time: they write the same, and one of theirs stays.
    """
    for tries_left in reversed(range(_TRIES)):
        try:
            fresh.rename(entry)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return
        if tries_left:
            old = Path(tempfile.mkdtemp(dir=entry.parent, prefix=_prefix("old")))
            with suppress(FileNotFoundError):  # another process was faster
                entry.rename(old)
            shutil.rmtree(old)
    shutil.rmtree(fresh)  # others keep writing the same: theirs is there


def _prefix(name: str) -> str:
    """Of a folder that is being written: whose it is can be told from its name."""
    return f".{name}-{_host()}-{os.getpid()}-"


@cache
def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _sweep(root: Path) -> None:
    """Remove what processes of this host were writing when they were killed, beside stages and within them."""
    stages = [Path(item) for item in os.scandir(root) if item.is_dir()]
    for folder in [*stages, *(inner for stage in stages for inner in _inside(stage))]:
        found = _TEMPORARY.match(folder.name)
        if found and found["host"] == _host() and not _is_running(int(found["process"])):
            shutil.rmtree(folder, ignore_errors=True)


def _inside(folder: Path) -> list[Path]:
    """What a folder holds; nothing, where another process has removed it meanwhile."""
    try:
        return [Path(item) for item in os.scandir(folder)]
    except OSError:
        return []


def _is_running(process: int) -> bool:
    if os.name != "posix":  # elsewhere the question would be a signal
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


class Store:
    """Records and arrays of finished stages, under one directory."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = tempfile.mkdtemp(dir=self.root, prefix=_prefix("probe"))
            Path(probe).rmdir()
            _sweep(self.root)
        except OSError as error:
            raise StoreError(
                f"cache directory {self.root}: cannot write ({error.strerror or error}); "
                "pass cache_dir= with a directory that is writable and has room"
            ) from error

    def _entry(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def has(self, stage: str, key: str) -> bool:
        """Whether the stage was finished for that key."""
        return (self._entry(stage, key) / "record.json").is_file()

    def get(self, cls: type[RecordT], stage: str, key: str) -> RecordT | None:
        """The record of a finished stage, or None. A damaged entry is removed and counts as none."""
        path = self._entry(stage, key) / "record.json"
        try:
            record = from_json(cls, json.loads(path.read_text(encoding="utf-8")), str(path))
            if (arrays := path.with_name("arrays.safetensors")).is_file():
                with safe_open(arrays, framework="np"):  # reads the header, checks the length
                    pass
        except FileNotFoundError:
            return None
        except (ValueError, ConfigError, SafetensorError):
            self.remove(stage, key)
            return None
        except OSError as error:
            raise StoreError(f"{path}: cannot read ({error.strerror or error})") from error
        return record

    def arrays(self, stage: str, key: str) -> dict[str, NDArray[Any]]:
        """The arrays of a finished stage; empty where it has none.

        Raises:
            StoreError: They can't be read. Damage that ``get`` can see makes it return None.
        """
        path = self._entry(stage, key) / "arrays.safetensors"
        if not path.is_file():
            return {}
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise StoreError(f"{path}: cannot read ({error}); delete it and run again") from error

    def put(self, stage: str, key: str, record: Any, arrays: Arrays | None = None) -> None:
        """Keep a finished stage: the whole entry appears at once.

        Raises:
            StoreError: The directory can't be written or is full; nothing partial stays.
        """
        entry = self._entry(stage, key)
        temporary: str | None = None
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.mkdtemp(dir=entry.parent, prefix=_prefix(key[:16]))
            if arrays:
                (Path(temporary) / "arrays.safetensors").write_bytes(save(dict(arrays)))
            (Path(temporary) / "record.json").write_text(dumps(record), encoding="utf-8")
            _replace(Path(temporary), entry)
        except OSError as error:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise StoreError(
                f"cache directory {self.root}: cannot keep stage {stage} "
                f"({error.strerror or error}); free some room or pass another cache_dir="
            ) from error

    def remove(self, stage: str, key: str) -> None:
        """Forget a stage."""
        shutil.rmtree(self._entry(stage, key), ignore_errors=True)
