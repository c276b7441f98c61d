"""Recurrent ops: lowered to ops that every backend has, or followed as one op each."""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import DispatchKey
from torch._decomp import decomposition_table

aten = torch.ops.aten

_NAMES = ("lstm", "gru", "rnn_tanh", "rnn_relu")
RECURRENT: frozenset[Any] = frozenset(getattr(aten, name).input for name in _NAMES)
_PARAMETERS = 4  # of one layer and direction: of the input, of the state, and their biases
_KEYS = (DispatchKey.CompositeImplicitAutograd, DispatchKey.Autograd)
_LOCK = threading.RLock()


def native_ops(module: fx.GraphModule) -> frozenset[Any]:
    """The recurrent ops that a backend may take as one op each, everywhere in a graph.

    That is where their weights are stored tensors and none has a projection of its states, which
    runtimes do not have.
    """
    nodes = [n for n in module.graph.nodes if n.op == "call_function" and n.target in RECURRENT]
    strange = {n.target for n in nodes if not _is_plain(n)}
    return frozenset(n.target for n in nodes) - strange


def _is_plain(node: fx.Node) -> bool:
    weights, has_biases, layers = node.args[2:5]
    assert isinstance(weights, list | tuple)
    directions = 2 if node.args[7] else 1
    each = _PARAMETERS if has_biases else _PARAMETERS // 2
    is_stored = all(isinstance(w, fx.Node) and w.op in ("get_attr", "placeholder") for w in weights)
    return is_stored and len(weights) == int(layers) * directions * each  # type: ignore[arg-type]


@contextmanager
def unrolled() -> Iterator[None]:
    """Decompose an LSTM step by step, as torch does with other recurrent ops.

    Where oneDNN is on and no gradient is asked for, torch puts one op of oneDNN in the place of a
    layer (``torch._decomp``), which only torch itself can run.
    """
    with torch.backends.mkldnn.flags(
        enabled=False,
        deterministic=torch._C._get_mkldnn_deterministic(),  # noqa: SLF001 - no public reader
        allow_tf32=torch._C._get_onednn_allow_tf32(),  # noqa: SLF001
        fp32_precision=None,
    ):
        yield


@contextmanager
def opaque(ops: Collection[Any] = RECURRENT) -> Iterator[None]:
    """While shapes are traced, some recurrent ops have results with shapes and nothing inside.

    torch follows such an op through every step, each time anew: a layer of 100 steps costs seconds
    wherever a shape is asked for. For tensors without data alone: the results are empty. An op that
    is decomposed in here would become nothing, so that ``ops`` are only those that are kept.
    """
    with _LOCK, ExitStack() as undo:
        for op in ops:
            for table, keys in _tables(op):
                for key in keys:
                    _put(table, key, _only_shapes, undo)
            undo.callback(op._dispatch_cache.clear)  # noqa: SLF001 - what was resolved before
            op._dispatch_cache.clear()  # noqa: SLF001
        yield


def _tables(op: Any) -> list[tuple[dict[Any, Any], list[Any]]]:
    kernels = op.py_kernels
    return [(decomposition_table, [op]), (kernels, [key for key in _KEYS if key in kernels])]


def _put(table: dict[Any, Any], key: Any, value: Callable[..., Any], undo: ExitStack) -> None:
    if key in table:
        undo.callback(table.__setitem__, key, table[key])
        table[key] = value


def _only_shapes(  # noqa: PLR0913, PLR0917 - the op's own arguments
    input: Tensor,  # noqa: A002 - the op's own name
    hx: Any,
    params: Any,  # noqa: ARG001
    has_biases: bool,  # noqa: ARG001
    num_layers: int,  # noqa: ARG001
    dropout: float,  # noqa: ARG001
    train: bool,  # noqa: ARG001
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Empty results: output [time, batch, directions * units], then the states."""
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    first, second = input.shape[0], input.shape[1]
    steps, batch = (second, first) if batch_first else (first, second)
    width = states[0].shape[2] * (2 if bidirectional else 1)
    out = input.new_empty((steps, batch, width))
    return (out.transpose(0, 1) if batch_first else out, *(s.new_empty(s.shape) for s in states))
