"""Recurrent layers: a unit is a row of every gate, a column of the next step, and a state.

With its weights at zero a unit's gates are halves and its candidate is zero: a state that starts at
zero stays zero, any other fades. All layers and directions of one op have the same units.
"""

from torch import fx

from tersor.graph.axes.labels import Dim, free
from tersor.graph.axes.rulebook import Call, Result, Shape, rule
from tersor.graph.axes.rules.products import contract

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*_GATES)
def recurrent(call: Call) -> Result:
    """Input [time, batch, features] -> outputs and states, several layers and directions."""
    states = [call.of(n) or [] for n in _nodes(call["hx"])]
    weights = [call.of(n) or [] for n in _nodes(call["params"])]
    if not states or any(s[-1].size != states[0][-1].size for s in states):
        call.freeze_all("states and outputs of a projection")
        return call.blank()
    x = call.dims("input")
    call.freeze([*x[:-1], *(d for s in states for d in s[:-1])], "steps, samples and layers")
    unit = _unit(call, states)
    directions = 2 if call["bidirectional"] else 1
    out = call.labels.merge([free(directions), unit])
    a_layer = len(weights) // (int(call["num_layers"]) * directions)
    for i in range(0, len(weights), a_layer):
        reads = x[-1] if i < a_layer * directions else out
        _layer(call, weights[i : i + a_layer], reads, unit)
    blank = call.outs
    found: list[Shape] = [[*map(free, blank[0][:-1]), out]]
    return found + [[*map(free, sizes[:-1]), unit] for sizes in blank[1:]]


def _nodes(value: object) -> list[fx.Node]:
    return [value] if isinstance(value, fx.Node) else list(value)  # type: ignore[call-overload]


def _unit(call: Call, states: list[Shape]) -> Dim:
    first = states[0][-1]
    for state in states:
        call.unify(first, state[-1])
    return Dim(first.rows, all(s[-1].zero for s in states))


def _layer(call: Call, weights: list[Shape], reads: Dim, unit: Dim) -> None:
    """Weights of the input and of the state, then their biases."""
    contract(call, weights[0][1], reads)
    contract(call, weights[1][1], unit)
    gates = _GATES[call.name]
    call.tag(unit, "neurons")
    for weight in weights:
        rows = weight[0].rows
        for k in range(gates):
            call.unify(unit, Dim(rows[k * unit.size : (k + 1) * unit.size]))
