from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tersor.artifact import Artifact, Manifest, Range, Ranges, write_artifact
from tersor.core.errors import ArtifactError, BackendError, ConfigError, GuardError
from tersor.core.records import BackendInfo, BuildChoice
from tersor.runtime import Guards, load_runner


class FakeBackend:
    """Multiplies by the number in its section."""

    def __init__(self, name: str, *, available: Any = True) -> None:
        self.name = name
        self.available = available
        self.loaded = []

    def describe(self) -> Any:
        return BackendInfo(
            name=self.name, available=self.available, reason="no driver", remedy="install one"
        )

    def load(self, sections: Any, choice: Any) -> Any:
        self.loaded.append((dict(sections), choice))
        factor = int(sections["factor.txt"])

        class Executable:
            def run(self, inputs: Any) -> Any:
                assert inputs["x"].shape[0] == choice.batch
                return {"y": inputs["x"] * factor}

        return Executable()


@pytest.fixture
def path(tmp_path: Path, simple: Any) -> Any:
    manifest = Manifest(
        tersor="0.1.0",
        created="now",
        signature=simple(),
        model="m",
        choices={
            "aaa": BuildChoice(backend="aaa", batch=2),
            "bbb": BuildChoice(backend="bbb", batch=3),
            "gpu": BuildChoice(backend="gpu", device="cuda", batch=4),
        },
        ranges=Ranges(inputs={"x": Range(low=-1.0, high=1.0)}),
    )
    builds = {"aaa": {"factor.txt": b"2"}, "bbb": {"factor.txt": b"3"}, "gpu": {"factor.txt": b"4"}}
    path = tmp_path / "m.tersor"
    write_artifact(path, Artifact(manifest=manifest, graph={}, tensors={}, builds=builds))
    return path


def backends(**available: Any) -> Any:
    made = {name: FakeBackend(name, available=ok) for name, ok in available.items()}

    def resolve(name: str) -> Any:
        if name not in made:
            raise ConfigError(f"no backend is called {name!r}")
        return made[name]

    return made, resolve


X = np.float32([[0.5, -0.5, 1.0]] * 5)


def test_the_first_build_that_runs_here_is_taken(path: Path):
    made, resolve = backends(aaa=True, bbb=True, gpu=True)
    runner = load_runner(path, resolve_backend=resolve)
    np.testing.assert_array_equal(runner(X), X * 2)
    assert made["aaa"].loaded == [({"factor.txt": b"2"}, BuildChoice(backend="aaa", batch=2))]
    assert made["bbb"].loaded == []


def test_a_backend_that_is_not_here_is_passed_over(path: Path):
    for made_available in ({"aaa": False, "bbb": True}, {"bbb": True}):
        _, resolve = backends(**made_available)
        runner = load_runner(str(path), "cpu", resolve_backend=resolve)
        np.testing.assert_array_equal(runner(X), X * 3)


def test_the_device_chooses_the_build(path: Path):
    made, resolve = backends(aaa=True, bbb=True, gpu=True)
    runner = load_runner(path, "cuda:1", resolve_backend=resolve)
    np.testing.assert_array_equal(runner(X), X * 4)
    assert made["gpu"].loaded[0][1].device == "cuda:1"


def test_guards_get_the_ranges_of_the_file(path: Path):
    _, resolve = backends(aaa=True)
    runner = load_runner(path, guards=Guards(range_factor=1.0), resolve_backend=resolve)
    np.testing.assert_array_equal(runner(X), X * 2)
    with pytest.raises(GuardError, match="found 4, wanted -1 to 1"):
        runner(X * 4)
    assert load_runner(path, resolve_backend=resolve)(X * 4).shape == X.shape


def test_no_build_that_runs_here_says_why_for_each(path: Path):
    _, resolve = backends(aaa=False)
    with pytest.raises(BackendError) as caught:
        load_runner(path, resolve_backend=resolve)
    message = str(caught.value)
    assert "m.tersor: no build in it runs on cpu" in message
    assert "aaa is not available: no driver; install one" in message
    assert "no backend is called 'bbb'" in message
    assert "gpu was built for cuda" in message
    assert "compress again for this machine" in message


def test_a_damaged_file_is_refused(path: Path):
    _, resolve = backends(aaa=True)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"factor.txt", b"faktor.txt", 1))
    with pytest.raises(ArtifactError):
        load_runner(path, resolve_backend=resolve)
