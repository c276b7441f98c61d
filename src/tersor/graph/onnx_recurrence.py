"""Plain recurrent layers as ONNX's RNN: torch's exporter has a form for LSTM and GRU alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op

aten = torch.ops.aten


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Op -> how it is written in ONNX, for ``torch.onnx.export``."""
    return {aten.rnn_tanh.input: _written("Tanh"), aten.rnn_relu.input: _written("Relu")}


def _written(kind: str) -> Callable[..., Any]:
    # The exporter reads what arguments are from these names and annotations, which are the op's own.
    def layers(  # noqa: PLR0913, PLR0917
        input: Any,  # noqa: A002
        hx: Any,
        params: Sequence[Any],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        del has_biases, dropout, train  # seen from the weights, and of training
        weights = _split(params, num_layers, 2 if bidirectional else 1)
        return _sequence(input, hx, weights, batch_first=batch_first, kind=kind)

    return layers


def _split(weights: Sequence[Any], layers: int, ways: int) -> list[list[Sequence[Any]]]:
    """The weights of every layer and direction: of the input, of the state, and their biases."""
    each = len(weights) // (layers * ways)
    parts = [weights[i : i + each] for i in range(0, len(weights), each)]
    return [parts[i : i + ways] for i in range(0, len(parts), ways)]


def _sequence(
    data: Any, state: Any, layers: Sequence[Sequence[Any]], *, batch_first: bool, kind: str
) -> tuple[Any, Any]:
    """Output [steps, batch, ways * units], or with the batch first, and the last states."""
    flow = op.Transpose(data, perm=[1, 0, 2]) if batch_first else data
    ways, ends = len(layers[0]), []
    for i, own in enumerate(layers):
        has_biases = len(own[0]) > 2
        out, end = op.RNN(
            flow,
            _stacked([w[0] for w in own]),
            _stacked([w[1] for w in own]),
            _stacked([op.Concat(w[2], w[3], axis=0) for w in own]) if has_biases else None,
            None,
            op.Slice(state, [i * ways], [(i + 1) * ways], [0]),
            activations=[kind] * ways,
            direction="bidirectional" if ways > 1 else "forward",
            hidden_size=int(own[0][1].shape[1]),
        )
        # [steps, ways, batch, units] -> [steps, batch, ways * units]
        flow = op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), [0, 0, -1])
        ends.append(end)
    out = op.Transpose(flow, perm=[1, 0, 2]) if batch_first else flow
    return out, ends[0] if len(ends) == 1 else op.Concat(*ends, axis=0)


def _stacked(parts: Sequence[Any]) -> Any:
    """Tensors as [ways, ...]."""
    wide = [op.Unsqueeze(part, [0]) for part in parts]
    return wide[0] if len(wide) == 1 else op.Concat(*wide, axis=0)
