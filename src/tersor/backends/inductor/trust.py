"""Which native sections this user's own builds wrote: only those run.

A package is machine code. Its SHA-256 is noted in the user's cache when it is built here; one from
elsewhere is not loaded, and the graph that lies beside it in the file is built instead.
"""

import hashlib
from pathlib import Path

from tersor.core.store import write_atomic


class BuildCache:
    """Hashes of native sections, one empty file each.

    Args:
        folder: Where they are kept; None: ~/.cache/tersor/native.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path.home() / ".cache" / "tersor" / "native"

    def note(self, package: bytes) -> None:
        """Trust a package that was just built."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / _digest(package), b"")

    def knows(self, package: bytes) -> bool:
        """Whether it was built by this user."""
        return (self.folder / _digest(package)).is_file()


def _digest(package: bytes) -> str:
    return hashlib.sha256(package).hexdigest()
