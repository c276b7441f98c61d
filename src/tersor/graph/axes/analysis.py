"""One walk over a graph: every tensor's dimensions get labels, rule by rule."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

import tersor.graph.axes.rules.attention
import tersor.graph.axes.rules.elementwise
import tersor.graph.axes.rules.indexing
import tersor.graph.axes.rules.joining
import tersor.graph.axes.rules.norms
import tersor.graph.axes.rules.products
import tersor.graph.axes.rules.recurrent
import tersor.graph.axes.rules.reductions
import tersor.graph.axes.rules.shapes
import tersor.graph.axes.rules.windows  # noqa: F401 - enters its rules
from tersor.graph.axes.labels import Dim, Labels, Reason, free
from tersor.graph.axes.routing import CARRIERS, READERS, barred_places, is_read_only_as
from tersor.graph.axes.rulebook import (
    RULES,
    Call,
    Shape,
    arguments,
    is_counted,
    op_name,
    schema_name,
    sizes_of,
)
from tersor.graph.edit import attribute


@dataclass
class Walk:
    """Labels of every dimension of every tensor of a graph.

    Attributes:
        shapes: Node -> its dimensions (a list of them for several results).
        stored: Name of a stored tensor -> its dimensions.
        unknown: Ops that met a labelled dimension and have no rule -> how often.
        numbers: Nodes whose values are numbers of units -> the dimension that they count.
        barred: Nodes to which removed units are minus infinity -> the dimension.
    """

    module: fx.GraphModule
    labels: Labels = field(default_factory=Labels)
    shapes: dict[fx.Node, Any] = field(default_factory=dict)
    stored: dict[str, Shape] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    numbers: dict[fx.Node, Dim] = field(default_factory=dict)
    barred: dict[fx.Node, int] = field(default_factory=dict)

    def run(self) -> "Walk":
        """Visit every node once, in order."""
        self.barred = barred_places(self.module)
        for node in self.module.graph.nodes:
            found = self._visit(node)
            if found is not None:
                self.shapes[node] = found
        return self

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._stored(node)
        if node.op == "output":
            self._freeze_outputs(node)
            return None
        if node.op == "placeholder":
            return _blank(node)
        if getattr(node.target, "__name__", "") == "getitem":
            return self._item(node)
        return self._call(node)

    def _stored(self, node: fx.Node) -> Shape:
        """Tensors that share a storage are one node since normalisation."""
        name = str(node.target)
        if name not in self.stored:
            tensor = attribute(self.module, name)
            has_labels = tensor.is_floating_point()
            self.stored[name] = [
                self.labels.fresh(n) if n > 1 and has_labels else free(n) for n in tensor.shape
            ]
        return self.stored[name]

    def _freeze_outputs(self, node: fx.Node) -> None:
        why = self.labels.reason(Reason("output", node.name, "an output of the model"))
        for source in node.all_input_nodes:
            self._hold_numbers(node, source)
            for dim in self.shapes.get(source, ()):
                if not isinstance(dim, list) and not dim.is_free:
                    self.labels.freeze(dim.rows, why)

    def _item(self, node: fx.Node) -> Any:
        source = node.args[0]
        found = self.shapes.get(source)  # type: ignore[arg-type]
        place = node.args[1]
        if source in self.numbers:
            self.numbers[node] = self.numbers[source]  # type: ignore[index]
        if found and isinstance(found[0], list) and isinstance(place, int):
            return found[place]
        return _blank(node)

    def _call(self, node: fx.Node) -> Any:
        value = node.meta.get("val")
        for source in node.all_input_nodes:
            self._hold_numbers(node, source)
        if not isinstance(value, Tensor | list | tuple):
            return None  # a number: sizes and what is computed from them
        name = op_name(node)
        function = RULES.get(name)
        call = Call(node, self.labels, self.shapes, name, self.numbers, node in self.barred)
        if _is_counted(node):
            call.freeze_all("elements that values choose")
            return call.blank()
        if function is None:
            return self._no_rule(call)
        found: Any = function(call)
        if isinstance(value, Tensor):
            return _settled(call, value, found)
        return [_settled(call, t, dims) for t, dims in zip(value, found, strict=True)]

    def _hold_numbers(self, node: fx.Node, source: fx.Node) -> None:
        """Numbers of units may be moved and may choose; anything else needs them as they are."""
        dim = self.numbers.get(source)
        name = op_name(node)
        if dim is None or name == "sym_size":
            return
        if name in CARRIERS and is_read_only_as(node, source, next(iter(arguments(node)))):
            self.numbers[node] = dim
        elif not (name in READERS and is_read_only_as(node, source, READERS[name])):
            call = Call(node, self.labels, self.shapes, name)
            call.freeze(dim, "computes with the numbers of its units")

    def _no_rule(self, call: Call) -> Any:
        if call.freeze_all("there is no rule for this op"):
            self.unknown[schema_name(call.node)] += 1
        return call.blank()


def _is_counted(node: fx.Node) -> bool:
    """Whether values decide how many elements an op reads or gives."""
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    flat = [v for value in values for v in (value if isinstance(value, list | tuple) else [value])]
    return any(is_counted(v) for v in flat)


def _blank(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return [free(n) for n in sizes_of(value)]
    if isinstance(value, list | tuple):
        return [[free(n) for n in sizes_of(t)] if isinstance(t, Tensor) else [] for t in value]
    return None


def _settled(call: Call, value: Any, found: Any) -> Shape:
    """A rule's result for one tensor; single elements stay, for ops repeat them as they need.

    A rule that loses a dimension is a fault of ours, not of the model.
    """
    sizes = sizes_of(value) if isinstance(value, Tensor) else []
    assert [d.size for d in found] == sizes, (
        f"{call.node.format_node()}: the rule gives {[d.size for d in found]}, the op {sizes}"
    )
    single = [d for d in found if d.size == 1]
    call.freeze(single, "a single element, which may be repeated")
    return [free(1) if d.size == 1 else d for d in found]
