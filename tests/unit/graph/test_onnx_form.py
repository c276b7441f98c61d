"""What is said of a graph that torch's exporter has no form for."""

import pytest
import torch
from torch import Tensor, nn

from tersor.build.export import exported_program
from tersor.core.errors import BackendError
from tersor.graph.onnx_form import to_onnx
from tests.unit.capturing import graph_of, random

SUMMARY = """\x1b[96m[torch.onnx] Obtain model graph... \x1b[0m failed
## Exception summary

<class 'ValueError'>: a size of 3, wanted 4
"""


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize(
    ("text", "said"),
    [(SUMMARY, "a size of 3, wanted 4"), ("\x1b[1msome words\x1b[0m\nand more", "some words")],
)
def test_the_first_cause_is_said_without_colours(
    monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError(text)

    program = exported_program(graph_of(Doubled(), random(2, 4)))
    monkeypatch.setattr(torch.onnx, "export", failing)
    with pytest.raises(BackendError) as error:
        to_onnx(program, ["x"], ["y"])
    assert str(error.value) == f"the graph has no ONNX form ({said})"
