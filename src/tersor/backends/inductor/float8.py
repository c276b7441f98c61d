"""Linears on 8-bit floats: ``kernels.linear8`` in place of products with what those stand for.

Weights of 8-bit floats that nothing so reads are expanded when the model is built.
"""

import torch
from torch import fx

from tersor.backends.inductor.work import Work, is_call
from tersor.graph.float8 import Float8Read, Float8Weight, float8_read, float8_weight
from tersor.kernels.linear8 import linear8, quantize_floats

_LINEAR = torch.ops.aten.linear.default


def float8_linears(work: Work) -> None:
    """Let linears read 8-bit floats; the graph is changed in place."""
    codes: dict[fx.Node, fx.Node] = {}
    for node in list(work.graph.nodes):
        if not work.form.integers or not is_call(node, _LINEAR):
            continue
        read, weight = float8_read(node.args[0]), float8_weight(node.args[1], work.tensors)
        if read is not None and weight is not None:
            _linear(work, node, read, weight, codes)
    work.graph.eliminate_dead_code()
    for node in list(work.graph.nodes):
        weight = float8_weight(node, work.tensors)
        if weight is not None:
            _expand(work, node, weight)


def _linear(
    work: Work, node: fx.Node, read: Float8Read, weight: Float8Weight, known: dict[fx.Node, fx.Node]
) -> None:
    bias = node.args[2] if len(node.args) > 2 else None
    scale = work.tensors[weight.scale].double().reshape(-1) * read.step
    offset = torch.zeros_like(scale)
    if bias is not None:
        if not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
            return
        offset = work.tensors[str(bias.target)].double()
    if read.node not in known:  # the codes that a tensor's readers share
        with work.graph.inserting_after(read.node):
            found = work.graph.call_function(quantize_floats, (read.source, read.step))
        known[read.node] = found
        work.sources[found.name] = read.node.name
    with work.graph.inserting_before(node):
        arguments = (
            known[read.node],
            work.graph.get_attr(weight.codes),
            work.constant(f"{node.name}_scale", scale.float()),
            work.constant(f"{node.name}_offset", offset.float()),
            torch.float32,
        )
        product = work.graph.call_function(linear8, arguments)
    work.sources[product.name] = node.name
    node.replace_all_uses_with(product)
    work.graph.erase_node(node)


def _expand(work: Work, node: fx.Node, weight: Float8Weight) -> None:
    name = f"tersor_{node.name}"
    work.tensors[name] = work.tensors[weight.codes].float() * work.tensors[weight.scale]
    with work.graph.inserting_before(node):
        node.replace_all_uses_with(work.graph.get_attr(name))
