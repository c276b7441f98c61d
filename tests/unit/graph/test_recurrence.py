"""Recurrent ops as one op each: shapes without the steps, and nothing left behind."""

import time

import pytest
import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from tersor.backends.openvino.skeleton import skeleton_of
from tersor.graph.recurrence import native_ops, opaque
from tersor.graph.split import split
from tests.unit.capturing import graph_of, random

KINDS = {
    "lstm": lambda **more: nn.LSTM(6, 8, 2, bidirectional=True, **more),
    "gru": lambda **more: nn.GRU(6, 8, 2, bidirectional=True, **more),
    "rnn": lambda **more: nn.RNN(6, 8, **more),
    "relu": lambda **more: nn.RNN(6, 8, nonlinearity="relu", bias=False, **more),
    "projected": lambda **more: nn.LSTM(6, 8, proj_size=4, **more),
}


class Stepper(nn.Module):
    def __init__(self, inner: nn.RNNBase) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)[0]
        return y


def _flat(found: tuple[Tensor, object]) -> list[Tensor]:
    out, states = found
    return [out, *(states if isinstance(states, tuple) else (states,))]  # type: ignore[list-item]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_those_of_the_op(kind: str, batch_first: bool) -> None:
    layer = KINDS[kind](batch_first=batch_first)
    wanted = _flat(layer(random(3, 5, 6)))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad(), enable_python_dispatcher(), opaque():
        found = _flat(layer(torch.empty(3, 5, 6)))
    assert [t.shape for t in found] == [t.shape for t in wanted]
    assert [t.stride() for t in found] == [t.stride() for t in wanted]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_behind(kind: str) -> None:
    layer = KINDS[kind]()
    x = random(3, 5, 6)
    wanted = layer(x)[0]
    before = [op.py_kernels.copy() for op in native_ops(graph_of(Stepper(layer), x).module)]
    with pytest.raises(ZeroDivisionError), opaque():
        _ = 1 / 0
    after = [op.py_kernels for op in native_ops(graph_of(Stepper(layer), x).module)]
    assert before == after
    assert torch.equal(layer(x)[0], wanted)


def test_projected_states_have_no_native_op() -> None:
    assert not native_ops(graph_of(Stepper(KINDS["projected"]()), random(3, 5, 6)).module)


def test_steps_do_not_multiply_the_work() -> None:
    """Unrolled, 400 steps of two layers and ways are some 20,000 nodes and minutes."""
    start = time.process_time()
    graph = graph_of(Stepper(KINDS["gru"](batch_first=True)), random(2, 400, 6))
    model = skeleton_of(graph, split(graph.module)).model
    assert len(model.get_ops()) < 200
    assert time.process_time() - start < 20  # a second or two
