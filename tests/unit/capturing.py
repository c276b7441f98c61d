"""Small models as graphs, the way ``compress`` captures them, for the tests of every stage."""

from typing import Any

import torch
from torch import Tensor, nn

from tersor.analyse.sites import find_sites
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.core.records import Site
from tersor.graph.contracts import Graph
from tersor.graph.edit import attribute


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(module: nn.Module, seed: int = 1) -> nn.Module:
    """Random weights and running statistics that no test gets by accident; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() + 0.5 if "running_var" in name else noise * 0.5)
    return module.eval()


def samples(item: Any) -> Samples:
    call, tensors = flatten_item(item, "item 0")
    return Samples(call, tensors)


def graph_of(module: nn.Module, *inputs: Tensor) -> Graph:
    """Of any module: what ops do to a whole batch is asked of modules that mix its samples, too."""
    return capture(module, samples(inputs), may_mix=True).graph


def targets(graph: Graph) -> list[str]:
    """The ops in order, without tensors and literals."""
    return [str(n.target) for n in graph.module.graph.nodes if n.op == "call_function"]


def site_of(graph: Graph, name: str) -> Site:
    return next(site for site in find_sites(graph) if site.name == name)


def tensor_of(graph: Graph, name: str) -> Tensor:
    return attribute(graph.module, name)


def scale_error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, of the largest value that was wanted."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
