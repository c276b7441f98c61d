"""Errors of edited graphs: only what an edit changes is run again, the rest is the original's."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from tersor.core.records import OutputKind
from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute, parameters_by_name, run_all, run_changed
from tersor.graph.geometry import output_error


def errors_of(
    graph: Graph,
    variants: Mapping[int, Graph],
    batches: Sequence[tuple[Tensor, ...]],
    kind: OutputKind,
) -> dict[int, Tensor]:
    """The output error of each edited graph over all samples; one pass of the original a batch.

    Args:
        graph: The original.
        variants: Edits of it, where nodes that stay keep their names.
        batches: Flat inputs.
        kind: The output's geometry.
    """
    before = {node.name: _literals(node) for node in graph.module.graph.nodes}
    stored = parameters_by_name(graph.module)
    output = next(node.name for node in graph.module.graph.nodes if node.op == "output")
    errors: dict[int, list[Tensor]] = {i: [] for i in variants}
    for flat in batches:
        env = run_all(graph.module, flat)
        wanted = env[output]
        for i, variant in variants.items():

            def is_changed(node: fx.Node, module: fx.GraphModule = variant.module) -> bool:
                if node.op == "get_attr":
                    name = str(node.target)
                    return name not in stored or _is_other(attribute(module, name), stored[name])
                return _literals(node) != before.get(node.name)

            errors[i].append(
                output_error(run_changed(variant.module, env, is_changed), wanted, kind)
            )
    return {i: torch.cat(rows) for i, rows in errors.items()}


def _literals(node: fx.Node) -> str:
    return f"{node.target} {node.args} {node.kwargs}"


def _is_other(left: Tensor, right: Tensor) -> bool:
    return left.shape != right.shape or left.data_ptr() != right.data_ptr()
