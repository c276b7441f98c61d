"""Experts: a removed one is never chosen, so its units are not zero but last in every order.

A router ranks units by a top-k, mostly behind a softmax. A logit of zero may still be the largest,
so removing a unit equals minus infinity to the *barred* ops, that top-k and that softmax: the
softmax gives zero there, and a top-k of no more units than stay never takes it. What is known of
the numbers that a top-k gives is whose they are: a table that they choose from loses the same
units, and after the cut they count those that stay.
"""

from torch import Tensor, fx

from tersor.graph.axes.rulebook import arguments, op_name

_COPIES = ("to", "_to_copy", "clone", "contiguous", "detach", "alias", "dropout")
_SOFTMAX = ("softmax", "_softmax")
# Ops of one element that may stand between a softmax and the top-k, such as a stored correction.
_SCORES = (*_COPIES, "add", "sub", "mul", "div", "sigmoid", "softplus", "sqrt", "tanh")

# Ops that read numbers of units, and where; everything else that meets them holds the units.
READERS = {
    "index": "indices",
    "gather": "index",
    "take_along_dim": "indices",
    "index_select": "index",
    "embedding": "indices",
    "one_hot": "self",
    "scatter": "index",
    "scatter_add": "index",
    "index_add": "index",
}
# Ops that only move numbers.
CARRIERS = (
    *_COPIES, "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze",
    "permute", "transpose", "t", "expand", "repeat", "repeat_interleave", "select", "slice",
    "narrow", "unbind", "split", "split_with_sizes", "chunk",
)  # fmt: skip


def barred_places(module: fx.GraphModule) -> dict[fx.Node, int]:
    """Nodes that read minus infinity at removed units, with the dimension."""
    found: dict[fx.Node, int] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and op_name(node) == "topk" and arguments(node)["largest"]:
            found |= _places(node)
    return found


def _places(node: fx.Node) -> dict[fx.Node, int]:
    """A top-k, and the softmax above it, with only scores of the same shape between them."""
    args = arguments(node)
    value = args["self"].meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
        return {}
    at = args["dim"] % value.dim()
    found, above = {node: at}, args["self"]
    while above.op == "call_function" and above.meta["val"].shape == value.shape:
        if op_name(above) in _SOFTMAX:
            return found | ({above: at} if arguments(above)["dim"] % value.dim() == at else {})
        sources = [n for n in above.all_input_nodes if n.op != "get_attr"]
        if op_name(above) not in _SCORES or len(sources) != 1:
            break
        above = sources[0]
    return found


def is_read_only_as(node: fx.Node, source: fx.Node, argument: str) -> bool:
    """Whether a node takes another as one argument and as no other."""
    places = [
        name
        for name, value in arguments(node).items()
        if value is source or (isinstance(value, list | tuple) and source in value)
    ]
    return places == [argument]
