"""Which assembler kernels go through: the newer one of Triton's where the usual one is known to be wrong."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from tersor.kernels.assembler import use_sound_assembler

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@dataclass(frozen=True)
class Tool:
    path: str
    version: str

    @staticmethod
    def from_path(path: str) -> "Tool":
        return Tool(path, "13.0")


def offer(
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    torch_home: Path,
    home: Path | None = None,
) -> SimpleNamespace:
    """Triton's assemblers, the usual one in a folder of the user's if there is one, and where torch lies."""
    import triton
    from triton import knobs

    own = Path(triton.__file__).parent / "backends"
    homes = {"ptxas": home or own, "ptxas_blackwell": own}
    offered = SimpleNamespace(**{n: Tool(str(homes[n] / n), v) for n, v in versions.items()})
    monkeypatch.setattr(knobs, "nvidia", offered)
    monkeypatch.setattr(torch, "__file__", str(torch_home / "__init__.py"))
    return offered


@pytest.mark.parametrize("usual", ["12.8", "12.4", "11.9"])
def test_the_newer_one_where_the_usual_one_is_wrong(
    usual: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offered = offer(monkeypatch, {"ptxas": usual, "ptxas_blackwell": "12.9"}, tmp_path)
    use_sound_assembler()
    assert offered.ptxas.endswith("ptxas_blackwell")


def test_torchs_own_before_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offered = offer(monkeypatch, {"ptxas": "12.8", "ptxas_blackwell": "12.9"}, tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ptxas").touch()
    use_sound_assembler()
    assert offered.ptxas == str(tmp_path / "bin" / "ptxas")


@pytest.mark.parametrize(
    ("versions", "home"),
    [
        ({"ptxas": "12.9", "ptxas_blackwell": "13.4"}, None),
        ({"ptxas": "13.0", "ptxas_blackwell": "13.0"}, None),
        ({"ptxas": "12.8", "ptxas_blackwell": "12.8"}, None),
        ({"ptxas": "12.8"}, None),
        ({"ptxas": "12.8", "ptxas_blackwell": "12.9"}, Path("/opt/cuda/bin")),  # the user's own
    ],
)
def test_the_usual_one_otherwise(
    versions: dict[str, str], home: Path | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offered = offer(monkeypatch, versions, tmp_path, home)
    usual = offered.ptxas
    use_sound_assembler()
    assert offered.ptxas is usual


def test_an_assembler_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    class Broken:
        written: ClassVar[list[str]] = []

        @property
        def ptxas(self) -> Any:
            message = "Cannot find ptxas"
            raise RuntimeError(message)

        @ptxas.setter
        def ptxas(self, path: str) -> None:
            self.written.append(path)

    monkeypatch.setattr(knobs, "nvidia", Broken())
    use_sound_assembler()
    assert not Broken.written


def test_builds_for_a_card_choose_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from tersor.backends.inductor import compiling
    from tersor.backends.inductor.compiling import Compiled
    from tersor.backends.inductor.options import Options

    calls: list[int] = []
    monkeypatch.setattr(compiling, "use_sound_assembler", lambda: calls.append(1))
    monkeypatch.setattr(compiling, "_just_in_time", lambda *_, **__: Compiled(call=lambda: ()))
    module = torch.fx.symbolic_trace(torch.nn.ReLU())
    example = torch.zeros(2)
    options = Options(mode="compile")
    compiling.compile_module(module, [example], options, is_open=True)
    assert not calls
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    compiling.compile_module(module, [example], options, is_open=True)
    assert calls
