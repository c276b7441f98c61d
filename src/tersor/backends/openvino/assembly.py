"""Skeleton + weights, biases and quantisers -> an OpenVINO model of one graph.

Integer weights stay integer constants (codes -> Convert -> Multiply by the scale), quantisers
become FakeQuantize: OpenVINO turns both into integer kernels. A weight that only its op stores as
integers carries a marker in its name, by which the loading half expands it (``executable``).
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from openvino import opset13 as op

from tersor.backends.openvino.channels_first import RANKS, Crossings
from tersor.backends.openvino.constants import ALIGNING, is_zero
from tersor.backends.openvino.executable import CODES, WEIGHT_ONLY
from tersor.backends.openvino.failures import shapes_refused
from tersor.backends.openvino.skeleton import Skeleton, skeleton_of
from tersor.core.errors import BackendError
from tersor.core.records import Signature
from tersor.graph.contracts import Graph, Shapes
from tersor.graph.split import Activation, Addition, Operation, Weight, split

_PRODUCTS = {"linear": ("MatMul",), "conv": ("Convolution", "GroupConvolution")}
_QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"
_EXTREMES = frozenset({"ReduceMax", "ReduceMin"})
_AUTOMATIC = re.compile(r"[A-Z][A-Za-z0-9]*_\d+")  # names that count what a process has made


def assemble(graph: Graph, shapes: Shapes, *, linear_as_convolution: bool) -> Any:
    """The ov.Model of a graph: inputs and outputs in the signature's order and by its names.

    Linears become convolutions only where every input has a shape: with an open batch OpenVINO (2026.4) computes wrong
    numbers behind such a one at a batch of 1 (a factor a channel and a quantiser that are fused into it).

    Raises:
        BackendError: An op without conversion.
        ShapeError: Shapes that the graph can't take.
    """
    parts = split(graph.module)
    skeleton = skeleton_of(graph, parts)
    is_fixed = all(spec.name in shapes for spec in graph.signature.inputs)
    assembly = Assembly(skeleton, linear_as_convolution=linear_as_convolution and is_fixed)
    model = assembly.finish(parts.operations, parts.additions)
    _name_ends(model, graph.signature)
    positions = {spec.name: i for i, spec in enumerate(graph.signature.inputs)}
    try:
        model.reshape({positions[name]: list(shape) for name, shape in shapes.items()})
    except RuntimeError as error:
        raise shapes_refused(error, shapes) from error
    return model


class Assembly:
    """One model in the making: a clone of a skeleton, edited in place."""

    def __init__(self, skeleton: Skeleton, *, linear_as_convolution: bool) -> None:
        self._linear_as_convolution = linear_as_convolution
        self._model = skeleton.model.clone()
        parameters = self._model.get_parameters()
        self._parameters = {name: parameters[i] for name, i in skeleton.parameters.items()}
        self._constants: dict[tuple[int, tuple[int, ...]], Any] = {}
        self._quantized: dict[tuple[str, str], Any] = {}
        self._crossings = Crossings()

    def finish(self, operations: Iterable[Operation], additions: Iterable[Addition] = ()) -> Any:
        """Put every operation's parts in; returns the ov.Model."""
        products = _by_source(self._model)
        for operation in operations:
            if operation.kind == "embedding":
                _redirect(self._parameter(operation), self._weight(operation, marked=True))
            else:
                self._product(operation, products)
            self._model.remove_parameter(self._parameters[operation.weight_input])
        adds = _by_source(self._model, {"Add"})
        for addition in additions:
            self._add(addition, adds)
        self._round_early()
        if self._quantized:
            _keep_extremes_whole(self._model)
        self._crossings.cancel(self._model)
        self._model.validate_nodes_and_infer_types()
        _settle_names(self._model)
        return self._model

    def _parameter(self, operation: Operation) -> Any:
        return self._parameters[operation.weight_input].output(0)

    def _product(self, operation: Operation, products: Mapping[str, list[Any]]) -> None:
        found = [
            node
            for node in products.get(operation.name, ())
            if node.get_type_name() in _PRODUCTS[operation.kind]
        ]
        if len(found) != 1:
            raise BackendError(
                f"openvino: {operation.name} ({operation.kind}) became {len(found)} products, "
                "wanted one; keep this layer as it is, or use another backend"
            )
        node = found[0]
        activation = operation.activation
        if activation is not None and self._becomes_convolution(operation, node):
            self._convolve(operation, activation, node)
            return
        shape = tuple(node.get_input_shape(1))  # a grouped convolution has its own
        weight = self._weight(operation, marked=activation is None, shape=shape)
        node.input(1).replace_source_output(weight)
        if activation is not None:
            reader = _before_padding(node, operation.name)
            source = reader.get_source_output()
            reader.replace_source_output(self._quantize(source, activation))
        if operation.bias is not None:
            _add_bias(operation.bias, node)

    def _add(self, addition: Addition, adds: Mapping[str, list[Any]]) -> None:
        found = adds.get(addition.name, [])
        if len(found) != 1:
            raise BackendError(
                f"openvino: {addition.name} became {len(found)} additions, wanted one; keep it in "
                "floats, or use another backend"
            )
        for position, activation in addition.operands.items():
            reader = found[0].input(position)
            source = reader.get_source_output()
            while source.get_node().get_type_name() in ALIGNING:  # to types that are equal here
                source = source.get_node().input_value(0)
            values = self._quantize(source, activation)
            base = f"{activation.name}/{_QUANTIZE}"
            if activation.add:
                shift = op.constant(np.float32(activation.add))
                values = _named(op.subtract(values, shift), f"{base}/Subtract")
            if activation.multiply is not None:
                factor = op.constant((1.0 / activation.multiply).astype(np.float32))
                values = _named(op.multiply(values, factor), f"{base}/Restore")
            reader.replace_source_output(values)

    def _round_early(self) -> None:
        """Quantisers in front of the max pools and the zero padding that only they read: the same numbers.

        The largest of rounded values is the rounded largest one; a pool of integers moves a
        quarter of the bytes, and the layer in front of it writes integers. Padding next to a
        convolution becomes that of the convolution.
        """
        for values in self._quantized.values():
            rounding = values.get_node()
            before = rounding.input_value(0).get_node()
            # The indices of a pool, if anything reads those, would be others where rounded values tie.
            alone = sum(len(out.get_target_inputs()) for out in before.outputs()) == 1
            if not alone or not (before.get_type_name() == "MaxPool" or _pads_zeros(before)):
                continue
            source = before.input_value(0)
            _redirect(values, before.output(0))
            rounding.input(0).replace_source_output(source)
            before.input(0).replace_source_output(values)

    def _becomes_convolution(self, operation: Operation, node: Any) -> bool:
        rank = node.get_input_partial_shape(0).rank
        return (
            self._linear_as_convolution
            and operation.kind == "linear"
            and operation.weight.scale is not None
            and rank.is_static
            and rank.get_length() in RANKS
            and node.get_attributes() == {"transpose_a": False, "transpose_b": True}
        )

    def _convolve(self, operation: Operation, activation: Activation, node: Any) -> None:
        base = _base(node)
        rank = node.get_input_partial_shape(0).rank.get_length()
        shape = (*operation.weight.values.shape, 1, 1)
        source = self._quantize(node.input(0).get_source_output(), activation)
        source = self._crossings.enter(source, rank, f"{base}/ChannelsFirst")
        weight = self._weight(operation, marked=False, shape=shape)
        product = op.convolution(source, weight, [1, 1], [0, 0], [0, 0], [1, 1])
        product.set_friendly_name(f"{base}/Convolution")
        if operation.bias is not None:
            bias = op.constant(operation.bias.reshape(1, -1, 1, 1))
            product = op.add(product, bias)
            product.set_friendly_name(f"{base}/Add")
        left = self._crossings.leave(product.output(0), rank, f"{base}/ChannelsLast")
        _redirect(node.output(0), left)

    def _quantize(self, source: Any, activation: Activation) -> Any:
        """FakeQuantize of a tensor, one for all its readers."""
        key = (f"{source.get_node().get_name()}:{source.get_index()}", activation.name)
        if key in self._quantized:
            return self._quantized[key]
        base = f"{activation.name}/{_QUANTIZE}"
        if activation.multiply is not None:
            factor = op.constant(activation.multiply)
            source = _named(op.multiply(source, factor), f"{base}/Multiply")
        if activation.add:
            shift = op.constant(np.float32(activation.add))
            source = _named(op.add(source, shift), f"{base}/Add")
        self._quantized[key] = _named(_fake_quantize(source, activation), f"{base}/FakeQuantize")
        return self._quantized[key]

    def _weight(
        self, operation: Operation, *, marked: bool, shape: tuple[int, ...] | None = None
    ) -> Any:
        """The output that carries a weight, in ``shape`` where the product wants another one."""
        weight = operation.weight
        wanted = shape if shape is not None else tuple(weight.values.shape)
        key = (weight.key, wanted)
        if weight.scale is None:
            if key not in self._constants:
                constant = op.constant(weight.values.reshape(wanted))
                self._constants[key] = _named(constant, f"{operation.name}/weight")
            return self._constants[key]
        codes = _named(op.constant(weight.values.reshape(wanted)), f"{operation.name}{CODES}")
        scale = _named(op.constant(_scale(weight.scale, weight, wanted)), f"{operation.name}/scale")
        floats = _named(op.convert(codes, "f32"), f"{operation.name}/convert")
        suffix = WEIGHT_ONLY if marked else "dequantize"
        return _named(op.multiply(floats, scale), f"{operation.name}/{suffix}")


def _fake_quantize(source: Any, activation: Activation) -> Any:
    """The grid step * [low - zero_point, high - zero_point], both ends included."""
    rank = source.get_partial_shape().rank
    shape = [1] * rank.get_length() if rank.is_static else []
    low = (activation.low - activation.zero_point) * activation.step
    high = (activation.high - activation.zero_point) * activation.step
    ends = [op.constant(np.full(shape, end, np.float32)) for end in (low, high, low, high)]
    return op.fake_quantize(source, *ends, activation.high - activation.low + 1)


def _scale(scale: NDArray[Any], weight: Weight, shape: tuple[int, ...]) -> NDArray[Any]:
    """The scale so that it broadcasts against the codes in ``shape``."""
    broadcast = [1] * weight.values.ndim
    broadcast[weight.axis] = -1
    aligned = scale.reshape(broadcast)
    if shape == weight.values.shape:
        return aligned
    if weight.axis != 0:
        return np.broadcast_to(aligned, weight.values.shape).reshape(shape)
    leading = 1  # dimensions of ``shape`` that hold the outputs: groups and outputs of a group
    while int(np.prod(shape[:leading])) < scale.size:
        leading += 1
    return scale.reshape(*shape[:leading], *[1] * (len(shape) - leading))


def _add_bias(bias: NDArray[Any], node: Any) -> None:
    """Add it behind a product: last for a linear, one a channel for a convolution."""
    trailing = node.get_output_partial_shape(0).rank.get_length() - 2
    shape = (-1,) if node.get_type_name() == "MatMul" else (1, -1, *[1] * trailing)
    output = node.output(0)
    readers = list(output.get_target_inputs())
    total = op.add(output, op.constant(bias.reshape(shape)))
    total.set_friendly_name(f"{_base(node)}/Add")
    for reader in readers:
        reader.replace_source_output(total.output(0))


def _before_padding(node: Any, name: str) -> Any:
    """The input that reads the op's tensor: padding of the op itself comes after the quantiser."""
    reader = node.input(0)
    source = reader.get_source_output().get_node()
    while source.get_type_name() == "Pad" and _source(source) == name:
        reader = source.input(0)
        source = reader.get_source_output().get_node()
    return reader


def _keep_extremes_whole(model: Any) -> None:
    """Read every largest and smallest value twice, so that nothing behind it is fused into it.

    OpenVINO's CPU kernel gives wrong numbers where it rounds the result itself (2026.4.1, AVX2: 55 %
    of the output's scale in a linear layer behind a maximum over time). It fuses with a single
    reader only; the maximum of a value and itself is the value.
    """
    for node in model.get_ops():
        if node.get_type_name() in _EXTREMES:
            readers = list(node.output(0).get_target_inputs())
            twice = op.maximum(node.output(0), node.output(0))
            twice.set_friendly_name(f"{_base(node)}/Maximum")
            for reader in readers:
                reader.replace_source_output(twice.output(0))


def _pads_zeros(node: Any) -> bool:
    """Whether a node puts zeros around a tensor: a grid of rounded values has a zero."""
    if node.get_type_name() != "Pad" or node.get_attributes()["pad_mode"] != "constant":
        return False
    if node.get_input_size() < 4:
        return True
    return is_zero(node.input_value(3).get_node())


def _named(node: Any, name: str) -> Any:
    node.set_friendly_name(name)
    return node.output(0)


def _redirect(old: Any, new: Any) -> None:
    for reader in list(old.get_target_inputs()):
        reader.replace_source_output(new)


def _source(node: Any) -> str:
    return str(node.get_friendly_name().partition("/")[0])


def _base(node: Any) -> str:
    return str(node.get_friendly_name().rpartition("/")[0])


def _by_source(model: Any, kinds: Collection[str] | None = None) -> dict[str, list[Any]]:
    kinds = kinds or {kind for kinds in _PRODUCTS.values() for kind in kinds}
    found: dict[str, list[Any]] = {}
    for node in model.get_ops():
        if node.get_type_name() in kinds:
            found.setdefault(_source(node), []).append(node)
    return found


def _settle_names(model: Any) -> None:
    """Names of a process' counters become positions: one graph gives one file."""
    for position, node in enumerate(model.get_ordered_ops()):
        name = node.get_friendly_name()
        if _AUTOMATIC.fullmatch(name) and name.startswith(node.get_type_name()):
            node.set_friendly_name(f"{node.get_type_name()}_{position}")


def _name_ends(model: Any, signature: Signature) -> None:
    """Tensor names for stock OpenVINO; friendly names for the loading half."""
    for port, spec in zip(model.inputs, signature.inputs, strict=True):
        port.get_node().set_friendly_name(spec.name)
        port.get_tensor().set_names({spec.name})
    for result, port, spec in zip(
        model.get_results(), model.outputs, signature.outputs, strict=True
    ):
        result.set_friendly_name(spec.name)
        port.get_tensor().set_names({spec.name})
