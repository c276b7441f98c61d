"""A graph with the original's calling convention, as an ``nn.Module``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tersor.core.errors import DataError
from tersor.core.records import Signature, TensorSpec
from tersor.core.structure import bind, unflatten
from tersor.graph.contracts import Graph

_FLOAT = torch.float32  # in which graphs compute


class GraphModule(nn.Module):
    """Calls like the original model; ``graph_module`` holds the nodes and the tensors."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph_module = graph.module
        self._signature = graph.signature
        # Empty, and no part of the state: it follows half(), double() and to(dtype).
        self.register_buffer("_marker", torch.empty(0, dtype=_FLOAT), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's containers and types around what the graph computes.

        Raises:
            DataError: Arguments that do not fit the signature, or a change between float and
                integer; names the argument.
        """
        marker = self.get_buffer("_marker")
        return called(self._signature, self.graph_module, args, kwargs, marker.dtype)


def called(
    signature: Signature,
    run: Callable[..., Sequence[Tensor]],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    computed: torch.dtype = _FLOAT,
) -> Any:
    """One call as the original takes it, of a function from flat tensors to flat tensors.

    Floats go in as the graph's type and come out as the original's; integers go in as the
    signature's. Gradients flow through.

    Args:
        signature: The original's.
        run: Takes and gives the flat tensors in the signature's order.
        args: As the original takes them.
        kwargs: As the original takes them.
        computed: The type in which ``run`` computes; where it is another than float32, the caller
            has chosen it for himself, and results stay as they are.

    Raises:
        DataError: Arguments that do not fit the signature, or a change between float and integer.
    """
    leaves = bind(signature, args, kwargs)
    flat = [_taken(x, spec, computed) for x, spec in zip(leaves, signature.inputs, strict=True)]
    outputs = list(run(*flat))
    if computed == _FLOAT:
        outputs = [_given(x, s) for x, s in zip(outputs, signature.outputs, strict=True)]
    return unflatten(signature.result, outputs)


def _taken(leaf: Any, spec: TensorSpec, computed: torch.dtype) -> Tensor:
    """One input in the type that the graph takes."""
    if not isinstance(leaf, Tensor):
        raise DataError(
            f"input {spec.name!r}: found a {type(leaf).__name__}, wanted a tensor; pass "
            "torch.as_tensor(...) of it"
        )
    wanted: torch.dtype = getattr(torch, spec.carrier)
    if wanted == _FLOAT:
        wanted = computed
    if leaf.dtype == wanted:
        return leaf
    # A bool is an integer of 0 and 1; no other change of kind is what a caller means.
    same = leaf.is_floating_point() == wanted.is_floating_point and not leaf.is_complex()
    if not same or wanted == torch.bool:
        raise DataError(
            f"input {spec.name!r}: found {_named(leaf.dtype)}, wanted {spec.dtype}; convert it "
            "yourself if that is what you mean"
        )
    if not wanted.is_floating_point:
        _check_fits(leaf, wanted, spec)
    return leaf.to(wanted)


def _check_fits(leaf: Tensor, wanted: torch.dtype, spec: TensorSpec) -> None:
    if leaf.dtype == torch.bool or not leaf.numel():
        return
    limits, low, high = torch.iinfo(wanted), int(leaf.min()), int(leaf.max())
    if low < limits.min or high > limits.max:
        raise DataError(
            f"input {spec.name!r}: found values from {low} to {high}, which do not fit {spec.dtype}"
        )


def _given(output: Tensor, spec: TensorSpec) -> Tensor:
    """One output in the original's own type: graphs compute those of half types in float32."""
    return output if spec.dtype == spec.carrier else output.to(getattr(torch, spec.dtype))


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["GraphModule", "called"]
