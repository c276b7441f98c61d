"""Files that take their place only when they were checked: whole, or what was there before stays."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tersor.core.errors import StoreError, TersorError


@contextmanager
def draft(path: Path, beside: Sequence[str] = ()) -> Iterator[Path]:
    """A path of the same name to write to; at the end, the files take the place of those at ``path``.

    It lies in a hidden folder beside ``path``: what is read there finds its other files by their
    names, and taking the place is one rename a file. Where anything inside raises, nothing at
    ``path`` was touched. A process that is killed between two renames leaves the first of them.

    Args:
        path: Where the file goes.
        beside: Suffixes of other files that belong to it and lie beside it. They go first: who
            finds a new file at ``path`` finds those that belong to it.

    Raises:
        StoreError: The folder of ``path`` can't be written, or a file there not replaced.
        TersorError: As raised inside; its message names ``path``, not the draft.
    """
    targets = [*(path.with_suffix(suffix) for suffix in beside), path]
    try:
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise _unwritable(path, error) from error
    with folder as name:
        fresh = [Path(name) / target.name for target in targets]
        try:
            yield fresh[-1]
        except TersorError as error:
            text = str(error)
            for made, target in zip(fresh, targets, strict=True):
                text = text.replace(str(made), str(target))
            raise type(error)(text) from error
        try:
            _place(fresh, targets, Path(name))
        except OSError as error:
            raise _unwritable(path, error) from error


def _place(fresh: Sequence[Path], targets: Sequence[Path], folder: Path) -> None:
    """Rename all files to their places; where one can't be, the earlier ones are as they were."""
    undo: list[tuple[Path, Path | None]] = []
    try:
        for made, target in zip(fresh, targets, strict=True):
            old = None
            if target is not targets[-1] and (target.is_symlink() or target.is_file()):
                old = folder / f"{target.name}.old"
                target.rename(old)
                undo.append((target, old))
                made.replace(target)
            else:  # one step, so that there is no moment without either
                made.replace(target)
                undo.append((target, None))
    except OSError:
        for target, old in reversed(undo):
            if old is None:
                target.unlink()
            else:
                old.replace(target)
        raise


def _unwritable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path}: cannot write ({error.strerror or error}); "
        "give a directory that is writable and has room"
    )


__all__ = ["draft"]
