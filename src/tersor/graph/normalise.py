"""An exported graph module becomes the one form that every stage reads.

Flat inputs, a flat tuple of tensor outputs, evaluation mode, and: wrappers of grad and autocast
inlined, identities (dropout, detach, assertions) gone, in-place ops (of slices, too) written as
functional ones, inputs never written to, SDPA's scale explicit, bags written as embeddings and
sums, products with a stored matrix written as ``linear``, batch norm folded into the convolution or
linear before it, subgraphs of parameters only computed once, tensors that share a storage kept once.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from tersor.graph.bags import write_bags
from tersor.graph.edit import attribute, rebuild
from tersor.graph.mutation import keep_inputs, remove_mutation, written_to

aten = torch.ops.aten

_IDENTITIES = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.dropout_.default,
    aten.alpha_dropout.default,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
}
_COPIES = {aten.lift_fresh_copy.default}
_CHECKS = {
    "_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range",
    "sym_constrain_range_for_size", "_guards_fn",
}  # fmt: skip
_WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
_FOLD_GROWTH = 2  # a folded constant may be this many times larger than what it is made of
_FOLD_FREE_BYTES = 1 << 20  # or at most this large


def normalise(module: fx.GraphModule, *, fold: bool = True) -> fx.GraphModule:
    """The normalised copy of an exported module; the argument is not changed.

    Args:
        module: From ``ExportedProgram.module(check_guards=False)``.
        fold: Also fold batch norms and constants, so that stored tensors are no longer all those of the
            model. Without it each stored tensor has the name that it has in the model.

    Returns:
        A graph module that owns clones of its tensors. Its output is a tuple of tensors.
    """
    graph, tensors = _plain_copy(module)
    _drop_checks(graph)
    _drop_constant_inputs(graph)
    _drop_identities(graph, _IDENTITIES)
    remove_mutation(graph)
    keep_inputs(graph)
    _drop_identities(graph, _COPIES, written_to(graph))
    _explicit_scale(graph)
    write_bags(graph)
    _share_storages(graph, tensors)
    if fold:
        _fold_constants(graph, tensors)
        _write_linear(graph, tensors)
        _fold_batch_norm(graph, tensors)
        _fold_constants(graph, tensors)
    graph.lint()
    return rebuild(graph, tensors)


def _plain_copy(module: fx.GraphModule) -> tuple[fx.Graph, dict[str, Tensor]]:
    """Copy with wrappers inlined, a plain signature and cloned tensors."""
    graph = fx.Graph()
    tensors: dict[str, Tensor] = {}
    clones: dict[tuple[Any, ...], Tensor] = {}
    _copy_into(graph, module, module, {}, tensors, clones)
    return graph, tensors


def _copy_into(  # noqa: C901, PLR0912 - one branch a kind of node
    graph: fx.Graph,
    module: fx.GraphModule,
    root: torch.nn.Module,
    values: dict[fx.Node, Any],
    tensors: dict[str, Tensor],
    clones: dict[tuple[Any, ...], Tensor],
) -> Any:
    """Copy the nodes of ``module`` after those of ``graph``; returns the flat outputs."""
    outputs: Any = ()
    for node in module.graph.nodes:
        if node in values or node.op == "call_module":  # the guards' check of the inputs
            continue
        if node.op == "output":
            outputs = tuple(values[n] for n in _flat_outputs(node.args[0]))
            if module is root:
                graph.output(outputs)
        elif node.op == "get_attr":
            value = _lookup(module, str(node.target))
            if isinstance(value, Tensor):  # else the body of a wrapper
                tensors[str(node.target)] = _clone_once(value, clones)
                values[node] = _twin(graph, node, values)
        elif getattr(node.target, "__name__", "") in _WRAPPERS:
            values[node] = _inline(graph, module, node, values, tensors, clones)
        elif node.target is operator.getitem and isinstance(values[node.args[0]], tuple):
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = _twin(graph, node, values)
    return outputs


def _inline(
    graph: fx.Graph,
    module: fx.GraphModule,
    node: fx.Node,
    values: dict[fx.Node, Any],
    tensors: dict[str, Tensor],
    clones: dict[tuple[Any, ...], Tensor],
) -> Any:
    position = next(
        i
        for i, a in enumerate(node.args)
        if isinstance(a, fx.Node) and a.op == "get_attr" and a not in values
    )
    body_node = node.args[position]
    assert isinstance(body_node, fx.Node)
    body = _lookup(module, str(body_node.target))
    inner: dict[fx.Node, Any] = {}
    holders = [n for n in body.graph.nodes if n.op == "placeholder"]
    for holder, argument in zip(holders, node.args[position + 1 :], strict=False):
        inner[holder] = values[argument] if isinstance(argument, fx.Node) else argument
    return _copy_into(graph, body, module, inner, tensors, clones)


def _twin(graph: fx.Graph, node: fx.Node, values: dict[fx.Node, Any]) -> fx.Node:
    twin = graph.create_node(
        node.op,
        node.target,
        fx.map_arg(node.args, lambda n: values[n]),
        fx.map_arg(node.kwargs, lambda n: values[n]),
        node.name,
    )
    if node.op == "placeholder":
        twin.args = ()  # a default value has no place in a flat signature
    twin.meta = dict(node.meta)
    return twin


def _lookup(module: torch.nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _clone_once(value: Tensor, clones: dict[tuple[Any, ...], Tensor]) -> Tensor:
    """One clone for each (storage, offset, shape, stride): tied weights stay tied."""
    key = (
        value.untyped_storage().data_ptr(),
        value.storage_offset(),
        tuple(value.shape),
        value.stride(),
        value.dtype,
    )
    if key not in clones or value.numel() == 0:
        clones[key] = value.detach().clone().contiguous()
    return clones[key]


def _flat_outputs(value: Any) -> list[fx.Node]:
    if isinstance(value, fx.Node):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [node for item in value for node in _flat_outputs(item)]
    return []


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op == "call_function"]


def _drop_checks(graph: fx.Graph) -> None:
    for node in reversed(_calls(graph)):
        name = str(node.target).rsplit("::", 1)[-1].split(".")
        if any(part in _CHECKS for part in name) and not node.users:
            graph.erase_node(node)


def _drop_constant_inputs(graph: fx.Graph) -> None:
    """None and plain numbers among the inputs were frozen by the export."""
    for node in list(graph.nodes):
        is_constant = node.op == "placeholder" and not isinstance(node.meta.get("val"), Tensor)
        if is_constant and not node.users:
            graph.erase_node(node)


def _drop_identities(
    graph: fx.Graph, targets: set[Any], keep: frozenset[fx.Node] = frozenset()
) -> None:
    for node in _calls(graph):
        if node.target in targets and node not in keep:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _explicit_scale(graph: fx.Graph) -> None:
    """Later slicing of the head dimension must not change SDPA's default scale."""
    for node in _calls(graph):
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        if node.kwargs.get("scale") is None and len(node.args) < 7:
            query = node.args[0]
            assert isinstance(query, fx.Node)
            size = query.meta["val"].shape[-1]
            node.kwargs = {**node.kwargs, "scale": 1.0 / math.sqrt(int(size))}


def _share_storages(graph: fx.Graph, tensors: dict[str, Tensor]) -> None:
    """One get_attr node for each tensor object; the first name wins."""
    first: dict[int, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        key = id(tensors[str(node.target)])
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
        else:
            first[key] = node


def _fold_constants(graph: fx.Graph, tensors: dict[str, Tensor]) -> None:
    """Compute what depends on parameters and literals only, unless it grows too much."""
    written = written_to(graph)
    for node in _calls(graph):
        if node in written or not _is_constant(node):
            continue
        sources = [tensors[str(n.target)] for n in node.all_input_nodes]
        args = fx.map_arg(node.args, lambda n: tensors[str(n.target)])
        kwargs = fx.map_arg(node.kwargs, lambda n: tensors[str(n.target)])
        with torch.no_grad():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        if not isinstance(value, Tensor) or value.is_complex():  # no file stores complex numbers
            continue
        size = value.numel() * value.element_size()
        made_of = sum(t.numel() * t.element_size() for t in sources)
        if size > max(_FOLD_FREE_BYTES, _FOLD_GROWTH * made_of):
            continue
        _replace_by_tensor(graph, node, value.clone().contiguous(), tensors)


def _is_constant(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):  # noqa: SLF001
        return False
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:  # noqa: SLF001
        return False
    return all(n.op == "get_attr" for n in node.all_input_nodes)


def _replace_by_tensor(
    graph: fx.Graph, node: fx.Node, value: Tensor, tensors: dict[str, Tensor]
) -> fx.Node:
    name = _constant_name(graph, node, tensors)
    tensors[name] = value
    with graph.inserting_before(node):
        constant = graph.create_node("get_attr", name, name=f"{node.name}_folded")
    constant.meta = {k: node.meta[k] for k in ("val", "nn_module_stack") if k in node.meta}
    node.replace_all_uses_with(constant)
    graph.erase_node(node)
    return constant


def _constant_name(graph: fx.Graph, node: fx.Node, tensors: dict[str, Tensor]) -> str:
    """A weight that is computed gets the name that its layer's own weight would have."""
    readers = (u for u in node.users if u.target in _FOLDABLE and u.args[1] is node)
    reader = next(readers, None)
    if reader is None:
        return _fresh_name(_module_path(node, node.name), tensors)
    for unused in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(unused)
    held = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    for name in set(tensors) - held:
        del tensors[name]
    return _fresh_name(_module_path(reader, "weight"), tensors)


def _module_path(node: fx.Node, leaf: str) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return f"{path}.{leaf}" if path else leaf


def _fresh_name(name: str, tensors: dict[str, Tensor]) -> str:
    parts = [f"t_{part.lstrip('_')}" if _is_taken(part) else part for part in name.split(".")]
    for i in range(1, len(parts)):
        if ".".join(parts[:i]) in tensors:  # a tensor holds no tensors
            parts = [*parts[: i - 1], "_".join(parts[i - 1 :])]
            break
    name = ".".join(parts)
    candidate, number = name, 1
    prefixes = {t.rsplit(".", i)[0] for t in tensors for i in range(1, t.count(".") + 1)}
    while candidate in tensors or candidate in prefixes:
        candidate, number = f"{name}_{number}", number + 1
    return candidate


def _is_taken(part: str) -> bool:
    """Names that a module has itself ("to", "half", "graph") hold no tensor."""
    return part.startswith("_") or hasattr(fx.GraphModule, part)


def _write_linear(graph: fx.Graph, tensors: dict[str, Tensor]) -> None:
    """addmm, mm and matmul with a stored matrix [in, out] become linear with [out, in]."""
    for node in _calls(graph):
        parts = _product_parts(node)
        if parts is None:
            continue
        data, matrix, bias = parts
        weight = _stored(matrix, tensors)
        if weight is None or weight.dim() != 2 or _stored(data, tensors) is not None:
            continue
        if bias is not None and ((b := _stored(bias, tensors)) is None or b.dim() != 1):
            continue
        assert isinstance(matrix, fx.Node)
        turned = _turned(graph, node, str(matrix.target), tensors)
        with graph.inserting_before(node):
            linear = graph.call_function(aten.linear.default, (data, turned, bias))
        linear.meta = dict(node.meta)
        node.replace_all_uses_with(linear)
        graph.erase_node(node)


def _turned(graph: fx.Graph, node: fx.Node, target: str, tensors: dict[str, Tensor]) -> fx.Node:
    """The transposed matrix before a node; ``x @ embedding.weight.T`` finds the table again."""
    value = tensors[target].t().contiguous()
    for other in graph.nodes:
        if other is node:
            break
        stored = _stored(other, tensors)
        if stored is not None and stored.dtype == value.dtype and torch.equal(stored, value):
            return other  # type: ignore[no-any-return]
    name = _fresh_name(f"{target}_transposed", tensors)
    tensors[name] = value
    with graph.inserting_before(node):
        return graph.create_node("get_attr", name, name=f"{node.name}_weight")


def _product_parts(node: fx.Node) -> tuple[Any, Any, Any] | None:
    if node.target is aten.addmm.default and not node.kwargs and len(node.args) == 3:
        return node.args[1], node.args[2], node.args[0]
    if node.target in (aten.mm.default, aten.matmul.default):
        return node.args[0], node.args[1], None
    return None


def _is_stored(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _stored(node: Any, tensors: dict[str, Tensor]) -> Tensor | None:
    return tensors[str(node.target)] if _is_stored(node) else None


_FOLDABLE: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    target: lambda weight, factor: weight * factor.reshape(-1, *[1] * (weight.dim() - 1))
    for target in (
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv1d.padding,
        aten.conv2d.padding,
        aten.conv3d.padding,
        aten.linear.default,
    )
}


def _fold_batch_norm(graph: fx.Graph, tensors: dict[str, Tensor]) -> None:
    for node in _calls(graph):
        if node.target is not aten.batch_norm.default or node.args[5]:
            continue
        producer = node.args[0]
        if not isinstance(producer, fx.Node) or producer.target not in _FOLDABLE:
            continue
        weight_node = producer.args[1]
        operands = [*producer.args[1:3], *node.args[1:5]]
        if len(producer.users) > 1 or not all(a is None or _is_stored(a) for a in operands):
            continue
        assert isinstance(weight_node, fx.Node)
        if len(weight_node.users) > 1 or not _is_channel_norm(producer, node):
            continue
        _fold_one(graph, tensors, producer, node)


def _is_channel_norm(producer: fx.Node, norm: fx.Node) -> bool:
    """A linear's outputs are the norm's channels only where its result is [batch, channels]."""
    if producer.target is not aten.linear.default:
        return True
    value = norm.meta.get("val")
    return value is not None and value.dim() == 2


def _fold_one(
    graph: fx.Graph, tensors: dict[str, Tensor], producer: fx.Node, norm: fx.Node
) -> None:
    weight_node = producer.args[1]
    assert isinstance(weight_node, fx.Node)
    weight = tensors[str(weight_node.target)]
    gamma, beta, mean, variance = (_stored(a, tensors) for a in norm.args[1:5])
    assert mean is not None
    assert variance is not None
    epsilon = float(norm.args[7])  # type: ignore[arg-type]
    factor = torch.rsqrt(variance.double() + epsilon)
    if gamma is not None:
        factor = factor * gamma.double()
    old_bias = _stored(producer.args[2] if len(producer.args) > 2 else None, tensors)
    bias = (0.0 if old_bias is None else old_bias.double()) - mean.double()
    bias = bias * factor + (0.0 if beta is None else beta.double())
    folded = _FOLDABLE[producer.target](weight.double(), factor).to(weight.dtype)
    tensors[str(weight_node.target)] = folded
    name = _fresh_name(f"{str(weight_node.target).removesuffix('.weight')}.folded_bias", tensors)
    tensors[name] = bias.to(weight.dtype)
    with graph.inserting_before(producer):
        bias_node = graph.create_node("get_attr", name, name=f"{producer.name}_bias")
    producer.args = (*producer.args[:2], bias_node, *producer.args[3:])
    norm.replace_all_uses_with(producer)
    graph.erase_node(norm)


def storages(module: fx.GraphModule) -> dict[int, list[str]]:
    """Names of tensors by storage address, to show that tied weights are kept once."""
    groups: dict[int, list[str]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            tensor = attribute(module, str(node.target))
            groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(str(node.target))
    return groups
