"""Which assembler kernels go through: the newer one of Triton's where the usual one is known to be wrong."""

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from tersor.kernels.assembler import use_sound_assembler

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
HOME = "/triton/bin"


def offer(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], home: str = HOME
) -> SimpleNamespace:
    """Triton's assemblers: the usual one in a folder, the newer one in Triton's own."""
    from triton import knobs

    homes = {"ptxas": home, "ptxas_blackwell": HOME}
    tools = {n: SimpleNamespace(path=f"{homes[n]}/{n}", version=v) for n, v in versions.items()}
    offered = SimpleNamespace(**tools)
    monkeypatch.setattr(knobs, "nvidia", offered)
    return offered


@pytest.mark.parametrize("usual", ["12.8", "12.4", "11.9"])
def test_the_newer_one_where_the_usual_one_is_wrong(
    usual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = offer(monkeypatch, {"ptxas": usual, "ptxas_blackwell": "12.9"})
    use_sound_assembler()
    assert offered.ptxas == f"{HOME}/ptxas_blackwell"


@pytest.mark.parametrize(
    ("versions", "home"),
    [
        ({"ptxas": "12.9", "ptxas_blackwell": "13.4"}, HOME),
        ({"ptxas": "13.0", "ptxas_blackwell": "13.0"}, HOME),
        ({"ptxas": "12.8", "ptxas_blackwell": "12.8"}, HOME),
        ({"ptxas": "12.8"}, HOME),
        ({"ptxas": "12.8", "ptxas_blackwell": "12.9"}, "/opt/cuda/bin"),  # the user's own
    ],
)
def test_the_usual_one_otherwise(
    versions: dict[str, str], home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = offer(monkeypatch, versions, home)
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
