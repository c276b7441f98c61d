"""Files take their place whole or not at all, and what was there before stays."""

from pathlib import Path

import pytest

from tersor.api.drafts import draft
from tersor.core.errors import BackendError, StoreError


def written(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() if p.is_file() else "a folder" for p in folder.iterdir()}


def write(path: Path, *, text: str = "new") -> None:
    path.write_text(text)
    path.with_suffix(".bin").write_text(text)


@pytest.mark.parametrize("before", [{}, {"m.xml": "old"}, {"m.xml": "old", "m.bin": "old"}])
def test_all_files_take_their_place(tmp_path: Path, before: dict[str, str]) -> None:
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    with draft(tmp_path / "m.xml", (".bin",)) as part:
        write(part)
        assert {k: v for k, v in written(tmp_path).items() if k in before} == before
    assert written(tmp_path) == {"m.xml": "new", "m.bin": "new"}


@pytest.mark.parametrize("error", [BackendError, KeyboardInterrupt, ValueError])
def test_where_anything_raises_nothing_is_touched(
    tmp_path: Path, error: type[BaseException]
) -> None:
    write(tmp_path / "m.xml", text="old")

    def failing() -> None:
        with draft(tmp_path / "m.xml", (".bin",)) as part:
            write(part)
            raise error

    with pytest.raises(error):
        failing()
    assert written(tmp_path) == {"m.xml": "old", "m.bin": "old"}


def test_an_error_names_the_path_and_not_the_draft(tmp_path: Path) -> None:
    path = tmp_path / "m.xml"

    def failing() -> None:
        with draft(path, (".bin",)) as part:
            raise BackendError(f"{part}: bad, see {part.with_suffix('.bin')}; say it")

    with pytest.raises(BackendError) as found:
        failing()
    assert str(found.value) == f"{path}: bad, see {path.with_suffix('.bin')}; say it"


@pytest.mark.parametrize("is_folder", ["m.xml", "m.bin"])
@pytest.mark.parametrize("other", ["old", None])
def test_a_place_that_can_t_be_taken_leaves_all_others(
    tmp_path: Path, is_folder: str, other: str | None
) -> None:
    (tmp_path / is_folder).mkdir()
    (tmp_path / is_folder / "inside").write_text("mine")
    if other is not None:
        (tmp_path / ({"m.xml", "m.bin"} - {is_folder}).pop()).write_text(other)
    before = written(tmp_path)
    with (
        pytest.raises(StoreError, match=r"m\.xml: cannot write \(.*directory"),
        draft(tmp_path / "m.xml", (".bin",)) as part,
    ):
        write(part)
    assert written(tmp_path) == before
    assert (tmp_path / is_folder / "inside").read_text() == "mine"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(
            StoreError,
            match=r"no/m\.onnx: cannot write \(No such file or directory\); give a directory",
        ),
        draft(tmp_path / "no" / "m.onnx"),
    ):
        pass
    assert written(tmp_path) == {}
