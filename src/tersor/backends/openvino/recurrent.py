"""Recurrent layers as OpenVINO's own sequences, which its frontend for graphs of ops does not make.

The graph is cut where such an op stands: what it reads become further outputs, what it gives further
inputs. After the conversion the sequences are built between the two, from stored weights whose gates
are brought into OpenVINO's order inside of the model, so that the weights stay what they are.
"""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from openvino import Type
from openvino import opset13 as op
from torch import Tensor, fx

from tersor.graph.edit import attribute

_aten = torch.ops.aten

# Gates in the order of OpenVINO, by their places in torch's: LSTM f i c o of i f g o, GRU z r h of r z n.
_GATES: dict[Any, tuple[int, ...]] = {
    _aten.lstm.input: (1, 0, 2, 3),
    _aten.gru.input: (1, 0, 2),
    _aten.rnn_tanh.input: (0,),
    _aten.rnn_relu.input: (0,),
}
_RESULT = "tersor_recurrent"


@dataclass(frozen=True, slots=True)
class Recurrent:
    """One op that was cut out.

    Attributes:
        name: The op's node.
        target: The op.
        reads: Positions among the outputs of the cut graph: the input, then the states.
        gives: Which of its results -> name of the placeholder that stands for it.
        weights: All layers' and directions', in torch's order.
    """

    name: str
    target: Any
    reads: tuple[int, ...]
    gives: Mapping[int, str]
    weights: tuple[Tensor, ...]
    has_biases: bool
    layers: int
    directions: int
    batch_first: bool


def cut(module: fx.GraphModule, kept: frozenset[Any]) -> list[Recurrent]:
    """Cut some recurrent ops out of a graph, in place."""
    graph = module.graph
    nodes = [n for n in graph.nodes if n.op == "call_function" and n.target in kept]
    if not nodes:
        return []
    end = next(n for n in graph.nodes if n.op == "output")
    found = []
    for node in nodes:
        outputs = list(end.args[0])  # each time anew: a result of an op before may be among them
        data, states, weights, has_biases, layers, _, _, both, batch_first = node.args
        states = [states] if isinstance(states, fx.Node) else list(states)
        places = range(len(outputs), len(outputs) + 1 + len(states))
        end.args = ((*outputs, data, *states),)
        found.append(
            Recurrent(
                name=node.name,
                target=node.target,
                reads=tuple(places),
                gives=_stand_ins(graph, node),
                weights=tuple(attribute(module, str(w.target)).detach() for w in weights),
                has_biases=has_biases,
                layers=layers,
                directions=2 if both else 1,
                batch_first=batch_first,
            )
        )
    for node in reversed(nodes):
        graph.erase_node(node)
    graph.eliminate_dead_code()
    module.recompile()
    return found


def _stand_ins(graph: fx.Graph, node: fx.Node) -> dict[int, str]:
    """A placeholder for each result that is read."""
    found = {}
    for user in list(node.users):
        assert user.target is operator.getitem
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        place = int(user.args[1])  # type: ignore[arg-type]
        with graph.inserting_after(last):
            holder = graph.placeholder(f"{_RESULT}_{node.name}_{place}")
        holder.meta = dict(user.meta)
        user.replace_all_uses_with(holder)
        graph.erase_node(user)
        found[place] = holder.name
    return found


def join(model: Any, cuts: Sequence[Recurrent]) -> None:
    """Put the sequences into a converted model, in place of what was cut."""
    results = model.get_results()
    holders = {p.get_friendly_name(): p for p in model.get_parameters()}
    spare = []
    for recurrent in cuts:
        ends = [results[i] for i in recurrent.reads]
        before = {node.get_friendly_name() for node in model.get_ops()}
        made = _sequences(recurrent, [end.input_value(0) for end in ends])
        for place, name in recurrent.gives.items():
            holders[name].output(0).replace(made[place])
        spare += ends
        _name(model, recurrent.name, before)
    for end in spare:
        model.remove_result(end)
    for recurrent in cuts:
        for name in recurrent.gives.values():
            model.remove_parameter(holders[name])
    model.validate_nodes_and_infer_types()


def _name(model: Any, name: str, before: set[str]) -> None:
    """New nodes read ``graph node/kind``, as those of the frontend do."""
    for i, node in enumerate(model.get_ops()):
        if node.get_friendly_name() not in before:
            node.set_friendly_name(f"{name}/{node.get_type_name()}_{i}")


def _sequences(recurrent: Recurrent, reads: Sequence[Any]) -> list[Any]:
    """The op's results, from what it reads."""
    data, *states = reads
    flow = data if recurrent.batch_first else op.transpose(data, [1, 0, 2]).output(0)
    each = len(recurrent.weights) // recurrent.layers
    last: list[list[Any]] = [[] for _ in states]
    for layer in range(recurrent.layers):
        weights = recurrent.weights[layer * each : (layer + 1) * each]
        first = layer * recurrent.directions
        begin = [_states(s, first, first + recurrent.directions) for s in states]
        out, *ends = _layer(recurrent, flow, begin, weights)
        # [batch, directions, steps, units] -> [batch, steps, directions * units]
        turned = op.transpose(out, [0, 2, 1, 3])
        flow = op.reshape(turned, [0, 0, -1], special_zero=True).output(0)
        for found, end in zip(last, ends, strict=True):
            found.append(op.transpose(end, [1, 0, 2]).output(0))
    out = flow if recurrent.batch_first else op.transpose(flow, [1, 0, 2]).output(0)
    joined = [s[0] if len(s) == 1 else op.concat(s, 0).output(0) for s in last]
    return [out, *joined]


def _states(state: Any, first: int, last: int) -> Any:
    """[layers * directions, batch, units] -> one layer's, [batch, directions, units]."""
    return op.transpose(op.slice(state, [first], [last], [1], [0]), [1, 0, 2])


def _layer(
    recurrent: Recurrent, flow: Any, states: Sequence[Any], weights: Sequence[Tensor]
) -> list[Any]:
    each = len(weights) // recurrent.directions
    ways = [weights[i : i + each] for i in range(0, len(weights), each)]
    order = _GATES[recurrent.target]
    reads = _stacked([_gates(w[0], order) for w in ways])
    steps = _stacked([_gates(w[1], order) for w in ways])
    biases = _stacked([_bias(recurrent, w, order) for w in ways])
    shape = op.shape_of(flow)
    length = op.broadcast(op.gather(shape, [1], 0), op.gather(shape, [0], 0))
    units = int(weights[1].shape[1])
    direction = "bidirectional" if recurrent.directions == 2 else "forward"
    rest = (length, reads, steps, biases, units, direction)
    if recurrent.target is _aten.lstm.input:
        made = op.lstm_sequence(flow, states[0], states[1], *rest)
    elif recurrent.target is _aten.gru.input:
        made = op.gru_sequence(flow, states[0], *rest, linear_before_reset=True)
    else:
        kind = "tanh" if recurrent.target is _aten.rnn_tanh.input else "relu"
        made = op.rnn_sequence(flow, states[0], *rest, activations=[kind])
    return list(made.outputs())


def _stacked(parts: Sequence[Any]) -> Any:
    """Values as [directions, ...]."""
    wide = [op.unsqueeze(part, [0]) for part in parts]
    return wide[0] if len(wide) == 1 else op.concat(wide, 0)


def _gates(weight: Tensor, order: Sequence[int]) -> Any:
    """Rows gate by gate, in another order; the constant stays as it is stored."""
    parts = _parts(weight, len(order))
    return op.concat([parts[i] for i in order], 0) if len(order) > 1 else parts[0]


def _parts(weight: Tensor, gates: int) -> list[Any]:
    stored = op.constant(np.ascontiguousarray(weight.cpu().numpy()), Type.f32)
    return list(op.split(stored, 0, gates).outputs()) if gates > 1 else [stored.output(0)]


def _bias(recurrent: Recurrent, weights: Sequence[Tensor], order: Sequence[int]) -> Any:
    """Both biases of one direction; a GRU keeps those of its last gate apart, as the reset is inside."""
    gates, units = len(order), int(weights[1].shape[1])
    is_gru = recurrent.target is _aten.gru.input
    if not recurrent.has_biases:
        return op.constant(np.zeros((gates + is_gru) * units, dtype=np.float32))
    reads, steps = (_parts(weights[i], gates) for i in (2, 3))
    if not is_gru:
        sums = [op.add(reads[i], steps[i]) for i in order]
        return op.concat(sums, 0) if gates > 1 else sums[0]
    update, reset, new = order
    sums = [op.add(reads[i], steps[i]) for i in (update, reset)]
    return op.concat([*sums, reads[new], steps[new]], 0)
