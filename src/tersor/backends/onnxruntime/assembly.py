"""Skeleton + weights, biases and quantisers -> the stored ONNX model of one graph.

An int8 linear is ONNX Runtime's own MatMulIntegerToFloat: its fusions make a float product of a
MatMul with a bias before they see that its operands are integers. An int8 convolution whose only readers take its result on one grid is written
as QLinearConv, from codes to codes, through the ReLU or pool between. ONNX Runtime has no such form for any other one: it is a
ConvInteger with a scale behind it, or computed in floats from the codes, as a build choice says.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tersor.backends.onnxruntime.executable import Constant, Stored
from tersor.backends.onnxruntime.following import Following, code_of
from tersor.backends.onnxruntime.skeleton import Skeleton, skeleton_of
from tersor.core.errors import BackendError, ShapeError
from tersor.graph.contracts import Graph, Shapes
from tersor.graph.shapes import OPEN
from tersor.graph.split import Activation, Operation, Split, split

_BLOCK = "model.bin"
_LINEAR, _DOMAIN = "MatMulIntegerToFloat", "com.microsoft"
_LEVELS = 256  # of an 8-bit grid
_INLINE_BYTES = 64  # constants up to this size stay in the structure
# What ONNX Runtime makes a part of the convolution in front of it.
_ACTIVATIONS = ("Relu", "Clip", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid")


def assemble(graph: Graph, shapes: Shapes, *, in_integers: bool) -> Stored:
    """The stored model of a graph: inputs and outputs in the signature's order and by its names.

    Args:
        graph: Read only.
        shapes: By input name; inputs that are not listed keep an open batch.
        in_integers: Convolutions that can't be fused multiply integers, not what they stand for.

    Raises:
        BackendError: An op without an ONNX form.
        ShapeError: Shapes that the graph can't take.
    """
    parts = split(graph.module)
    skeleton = skeleton_of(graph, parts)
    model = _Assembly(skeleton, parts, in_integers=in_integers).finish()
    _set_shapes(model, shapes)
    return _stored(model, skeleton.sources)


def read_stored(path: Path, shapes: Shapes) -> Stored:
    """A model from an ONNX file.

    Raises:
        BackendError: No ONNX file.
    """
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf's and the package's own have no common type
        raise BackendError(f"onnxruntime: {path} is no ONNX file: {error}") from error
    _set_shapes(model, shapes)
    return _stored(model, {})


class _Assembly:
    """One model in the making: the skeleton's nodes with the operations written out."""

    def __init__(self, skeleton: Skeleton, parts: Split, *, in_integers: bool) -> None:
        operations = parts.operations
        self._additions = {a.name: a for a in parts.additions}
        self._in_integers = in_integers
        self._model = onnx.ModelProto()
        self._model.CopyFrom(skeleton.model)
        self._old = list(self._model.graph.node)
        self._by_weight = {o.weight_input: o for o in operations}
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._quantized: dict[tuple[str, str], tuple[str, str, str]] = {}
        self._dequantized: dict[str, str] = {}
        self._coded: dict[str, tuple[str, Activation]] = {}  # value -> its codes
        self._weights: dict[tuple[int, tuple[int, ...], bool], str] = {}
        self._turned: dict[str, Operation] = {}  # transposed weight -> its operation
        for node in self._old:
            if node.op_type == "Transpose" and node.input[0] in self._by_weight:
                self._turned[node.output[0]] = self._by_weight[node.input[0]]
        self._following = Following(self._model.graph)
        self._readers: dict[str, list[tuple[Any, int]]] = {}
        for node in self._old:
            for place, name in enumerate(node.input):
                self._readers.setdefault(name, []).append((node, place))
        for value in self._model.graph.output:
            self._readers.setdefault(value.name, []).append((value, -1))

    def finish(self) -> onnx.ModelProto:
        for node in self._old:
            operation = self._operation(node)
            if operation is None:
                (self._follow if node.input and node.input[0] in self._coded else self._copy)(node)
            elif operation.kind == "conv":
                self._conv(node, operation)
            else:
                self._linear(node, operation)
        graph = self._model.graph
        del graph.node[:]
        graph.node.extend(self._nodes)
        graph.initializer.extend(self._constants.values())
        inputs = [v for v in graph.input if v.name not in self._by_weight]
        del graph.input[:]
        graph.input.extend(inputs)
        if any(node.domain == _DOMAIN for node in graph.node):
            self._model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))
        return self._model

    def _operation(self, node: Any) -> Operation | None:
        """The operation that a node multiplies for, or None."""
        if len(node.input) < 2:
            return None
        if node.op_type in ("Conv", "Gemm"):
            return self._by_weight.get(node.input[1])
        return self._turned.get(node.input[1]) if node.op_type == "MatMul" else None

    def _copy(self, node: Any) -> None:
        """A node as it is; where it reads a weight, a float one."""
        if node.op_type == "Transpose" and node.output[0] in self._turned:
            users = self._readers.get(node.output[0], [])
            if all(user.op_type == "MatMul" and place == 1 for user, place in users):
                return  # written out with its products
        for place, name in enumerate(node.input):
            if name in self._by_weight:
                operation = self._by_weight[name]
                if operation.bias is not None or operation.activation is not None:
                    raise BackendError(
                        f"onnxruntime: {operation.name} became {node.op_type}, wanted Conv, Gemm or "
                        "MatMul; use another backend"
                    )
                node.input[place] = self._float_weight(operation)
        addition = self._additions.get(node.name.partition("/")[0])
        if addition is not None and node.op_type == "Add":
            for place, activation in addition.operands.items():
                node.input[place] = self._restored(node.input[place], activation)
        self._nodes.append(node)

    def _restored(self, value: str, activation: Activation) -> str:
        """A tensor through its quantiser, in its own units again."""
        base, found = activation.name, self._dequantize(value, activation)
        if activation.add:
            shift = self._constant(f"{base}/shift", np.float32(activation.add))
            found = self._add("Sub", [found, shift], f"{base}/shifted_back")
        if activation.multiply is not None:
            factor = self._constant(f"{base}/inverse", (1 / activation.multiply).astype(np.float32))
            found = self._add("Mul", [found, factor], f"{base}/restored")
        return found

    def _linear(self, node: Any, operation: Operation) -> None:
        base, out = operation.name, node.output[0]
        bias = "" if operation.bias is None else self._constant(f"{base}/bias", operation.bias)
        if operation.activation is not None and operation.weight.scale is not None:
            data, step, zero = self._quantize(node.input[0], operation.activation)
            codes = self._transposed(self._codes(operation), f"{base}/codes")
            scale = self._constant(f"{base}/scale", operation.weight.scale.reshape(-1))
            inputs = [data, codes, step, scale, zero, "", bias]
            self._add(_LINEAR, inputs, out, name=f"{base}/{_LINEAR}", domain=_DOMAIN)
            return
        product = f"{base}/product" if bias else out
        weight = self._transposed(self._float_weight(operation), base)
        self._add("MatMul", [node.input[0], weight], product, name=f"{base}/MatMul")
        if bias:
            self._add("Add", [product, bias], out, name=f"{base}/Add")

    def _conv(self, node: Any, operation: Operation) -> None:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        activation, scale = operation.activation, operation.weight.scale
        result = self._result_grid(node.output[0])
        if activation is None or scale is None:
            self._float_conv(node, operation, node.input[0], attributes)
        elif result is not None:
            self._fused_conv(node, operation, activation, result, attributes)
        elif self._in_integers:
            self._integer_conv(node, operation, activation, attributes)
        else:
            data = self._dequantize(node.input[0], activation)
            self._float_conv(node, operation, data, attributes)

    def _float_conv(
        self, node: Any, operation: Operation, data: str, attributes: dict[str, Any]
    ) -> None:
        inputs = [data, self._float_weight(operation)]
        if operation.bias is not None:
            inputs.append(self._constant(f"{operation.name}/bias", operation.bias))
        name = f"{operation.name}/Conv"
        self._add("Conv", inputs, node.output[0], name=name, **attributes)

    def _fused_conv(
        self,
        node: Any,
        operation: Operation,
        data: Activation,
        result: Activation,
        attributes: dict[str, Any],
    ) -> None:
        """Codes in, codes out: what reads the result finds them in place of a quantiser's."""
        base, scale = operation.name, operation.weight.scale
        assert scale is not None
        codes, step, zero = self._quantize(node.input[0], data)
        inputs = [codes, step, zero, self._codes(operation)]
        inputs.append(self._constant(f"{base}/scale", scale.reshape(-1)))
        inputs.append(self._constant(f"{base}/zeros", np.zeros(scale.size, np.int8)))
        inputs += self._grid(result)
        if operation.bias is not None:
            steps = scale.reshape(-1).astype(np.float64) * data.step
            bias = np.clip(np.rint(operation.bias / steps), -(2**31), 2**31 - 1).astype(np.int32)
            inputs.append(self._constant(f"{base}/bias_codes", bias))
        out = f"{base}/result_codes"
        self._add("QLinearConv", inputs, out, name=f"{base}/QLinearConv", **attributes)
        self._stands_for(node.output[0], out, result)

    def _stands_for(self, value: str, codes: str, activation: Activation) -> None:
        self._coded[value] = (codes, activation)
        self._quantized[value, activation.name] = (codes, *self._grid(activation))

    def _follow(self, node: Any) -> None:
        """What stands between a fused convolution and its readers works on codes, too."""
        codes, activation = self._coded[node.input[0]]
        out = f"{node.name}/codes"
        if (ends := self._following.ends(node)) is not None:
            limits = [code_of(end, activation) for end in ends]
            if limits == [0, _LEVELS - 1]:
                out = codes  # the grid ends there
            else:
                names = [
                    self._constant(f"{node.name}/end_{i}", np.uint8(limit))
                    for i, limit in enumerate(limits)
                ]
                self._add("Clip", [codes, *names], out, name=f"{node.name}/Clip")
        elif node.op_type == "Pad":
            code = np.uint8(code_of(self._following.padding(node), activation))
            border = self._constant(f"{node.name}/border", code)
            rest = list(node.input[3:])
            inputs = [codes, node.input[1], border, *rest]
            self._add("Pad", inputs, out, name=f"{node.name}/Pad", mode="constant")
        else:
            node.input[0] = codes
            value, node.output[0] = node.output[0], out
            self._nodes.append(node)
            self._stands_for(value, out, activation)
            return
        self._stands_for(node.output[0], out, activation)

    def _integer_conv(
        self, node: Any, operation: Operation, activation: Activation, attributes: dict[str, Any]
    ) -> None:
        base, weight = operation.name, operation.weight
        assert weight.scale is not None
        quantized, _, zero = self._quantize(node.input[0], activation)
        inputs = [quantized, self._codes(operation), zero]
        self._add("ConvInteger", inputs, f"{base}/sums", name=f"{base}/ConvInteger", **attributes)
        self._add("Cast", [f"{base}/sums"], f"{base}/floats", to=TensorProto.FLOAT)
        trailing = [1] * (weight.values.ndim - 2)
        steps = (weight.scale.reshape(1, -1, *trailing) * activation.step).astype(np.float32)
        product = f"{base}/product" if operation.bias is not None else node.output[0]
        self._add("Mul", [f"{base}/floats", self._constant(f"{base}/steps", steps)], product)
        if operation.bias is not None:
            bias = self._constant(f"{base}/bias", operation.bias.reshape(1, -1, *trailing))
            self._add("Add", [product, bias], node.output[0])

    def _result_grid(self, value: str) -> Activation | None:
        """The one grid on which all read a value, behind a ReLU or a pool; None if not all do."""
        readers = self._readers.get(value, [])
        while len(readers) == 1 and readers[0][1] == 0 and self._following.allows(readers[0][0]):
            readers = self._readers.get(readers[0][0].output[0], [])
        grids: dict[str, Activation] = {}
        for node, place in readers:
            operation = self._operation(node) if place == 0 else None
            activation = operation.activation if operation is not None else None
            if activation is None or activation.multiply is not None or activation.add:
                return None
            if activation.high - activation.low + 1 != _LEVELS:
                return None
            grids[activation.name] = activation
        return next(iter(grids.values())) if len(grids) == 1 else None

    def _quantize(self, value: str, activation: Activation) -> tuple[str, str, str]:
        """Codes of a tensor, one quantiser for all its readers; with its step and zero point."""
        key = (value, activation.name)
        if key in self._quantized:
            return self._quantized[key]
        base, source = activation.name, value
        if activation.multiply is not None:
            factor = self._constant(f"{base}/factor", activation.multiply)
            source = self._add("Mul", [source, factor], f"{base}/scaled")
        if activation.add:
            shift = self._constant(f"{base}/shift", np.float32(activation.add))
            source = self._add("Add", [source, shift], f"{base}/shifted")
        if activation.high - activation.low + 1 != _LEVELS:
            ends = [(e - activation.zero_point) * activation.step
                    for e in (activation.low, activation.high)]  # fmt: skip
            limits = [self._constant(f"{base}/end_{i}", np.float32(e)) for i, e in enumerate(ends)]
            source = self._add("Clip", [source, *limits], f"{base}/clipped")
        step, zero = self._grid(activation)
        name = f"{base}/QuantizeLinear"
        self._add("QuantizeLinear", [source, step, zero], f"{base}/quantized", name=name)
        self._quantized[key] = (f"{base}/quantized", step, zero)
        return self._quantized[key]

    def _grid(self, activation: Activation) -> tuple[str, str]:
        """Step and zero point."""
        base, zero = activation.name, activation.zero_point - activation.low
        step = self._constant(f"{base}/step", np.float32(activation.step))
        return step, self._constant(f"{base}/zero", np.uint8(zero))

    def _dequantize(self, value: str, activation: Activation) -> str:
        quantized, step, zero = self._quantize(value, activation)
        if quantized not in self._dequantized:
            out = f"{activation.name}/dequantized"
            self._dequantized[quantized] = self._add(
                "DequantizeLinear", [quantized, step, zero], out
            )
        return self._dequantized[quantized]

    def _codes(self, operation: Operation) -> str:
        key = (operation.weight.key, operation.weight.values.shape, True)
        if key not in self._weights:
            name = f"{operation.name}/weight_codes"
            self._weights[key] = self._constant(name, operation.weight.values)
        return self._weights[key]

    def _float_weight(self, operation: Operation) -> str:
        """A weight in float32; integers are expanded once, when a session starts."""
        weight, base = operation.weight, operation.name
        key = (weight.key, weight.values.shape, False)
        if key in self._weights:
            return self._weights[key]
        if weight.scale is None:
            self._weights[key] = self._constant(f"{base}/weight", weight.values)
            return self._weights[key]
        shape = [1] * weight.values.ndim
        shape[weight.axis] = -1
        scale = self._constant(f"{base}/weight_scale", weight.scale.reshape(shape))
        floats = f"{base}/weight_floats"
        self._add("Cast", [self._codes(operation)], floats, to=TensorProto.FLOAT)
        self._weights[key] = self._add("Mul", [floats, scale], f"{base}/weight")
        return self._weights[key]

    def _transposed(self, value: str, base: str) -> str:
        return self._add("Transpose", [value], f"{base}_transposed", perm=[1, 0])

    def _constant(self, name: str, array: NDArray[Any] | np.generic) -> str:
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def _add(
        self,
        kind: str,
        inputs: Sequence[str],
        output: str,
        *,
        name: str = "",
        domain: str = "",
        **attributes: Any,
    ) -> str:
        name = name or f"{output}/{kind}"
        fresh = helper.make_node(kind, inputs, [output], name=name, domain=domain)
        fresh.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        self._nodes.append(fresh)
        return output


def _set_shapes(model: onnx.ModelProto, shapes: Shapes) -> None:
    """Concrete sizes in the inputs' types; open ones stay as they are."""
    for value in model.graph.input:
        if value.name not in shapes:
            continue
        dims, wanted = value.type.tensor_type.shape.dim, shapes[value.name]
        fixed = [d.dim_value for d in dims]
        fits = len(dims) == len(wanted) and all(
            f in (0, w) or w == OPEN for f, w in zip(fixed, wanted, strict=True)
        )
        if not fits:
            raise ShapeError(
                f"onnxruntime: the graph can't take {value.name} as {tuple(wanted)}; wanted "
                f"{[d.dim_value or d.dim_param for d in dims]}"
            )
        for place, (dim, size) in enumerate(zip(dims, wanted, strict=True)):
            if size != OPEN:
                dim.dim_value = size
            elif not dim.dim_param:  # by its name a session can be started for one size
                dim.dim_param = f"{value.name}_{place}"
    for value in model.graph.output:  # follow from the inputs'
        value.type.tensor_type.ClearField("shape")


def _stored(model: onnx.ModelProto, sources: Mapping[str, str]) -> Stored:
    """Move the large constants into a block; the structure says where they lie."""
    block = bytearray()
    constants: list[Constant] = []
    places: dict[bytes, int] = {}
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        data = array.tobytes()
        if len(data) <= _INLINE_BYTES or array.dtype.kind not in "fiub":
            continue
        if data not in places:
            places[data] = len(block)
            block += data
        offset = places[data]
        constants.append(
            Constant(tensor.name, str(array.dtype), tuple(array.shape), offset, len(data))
        )
        _refer(tensor, offset, len(data))
    structure = model.SerializeToString(deterministic=True)
    return Stored(structure, bytes(block), tuple(constants), dict(sources), _fused(model, sources))


def _fused(model: onnx.ModelProto, sources: Mapping[str, str]) -> dict[str, str]:
    """Activation -> the convolution that it alone reads, both as graph nodes."""

    def source(node: Any) -> str:
        first, slash, _ = node.output[0].partition("/")
        return str(first if slash else sources.get(node.output[0], node.name))

    made = {node.output[0]: node for node in model.graph.node if node.op_type == "Conv"}
    reads = Counter(name for node in model.graph.node for name in node.input)
    outputs = {value.name for value in model.graph.output}
    return {
        source(node): source(made[node.input[0]])
        for node in model.graph.node
        if node.op_type in _ACTIVATIONS
        and node.input[0] in made
        and reads[node.input[0]] == 1
        and node.input[0] not in outputs
    }


def _refer(tensor: Any, offset: int, size: int) -> None:
    for name in ("raw_data", "float_data", "int32_data", "int64_data", "double_data"):
        tensor.ClearField(name)
    tensor.data_location = TensorProto.EXTERNAL
    entries = (("location", _BLOCK), ("offset", str(offset)), ("length", str(size)))
    for key, text in entries:
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
