"""Residual networks for 28 x 28 images, and how many units they keep at a share of their work."""

import copy
from collections.abc import Callable, Mapping
from functools import cache
from math import prod

import torch
from torch import Tensor, nn

from benchmarks.prune import Pruner, read, total_macs
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.cli.demo.zoo import ResNet
from tersor.train.cutting import cut_
from tersor.train.factorable import find_layers
from tersor.train.pairs import blank_pair, put_in_place
from tersor.train.probe import Probe
from tersor.train.structure import Structure, find_structure
from tests.data.zoo import load_resnet20

IMAGES = torch.zeros(2, 1, 28, 28)
SMALL = 3  # blocks a stage: ResNet-20
Counts = dict[str, int]


def macs_of(model: nn.Module) -> int:
    """Of one sample."""
    plain = copy.deepcopy(model).cpu()
    return total_macs(capture(plain, Samples(*flatten_item(IMAGES, "example"))).graph)


@cache
def whole_macs(blocks: int) -> int:
    """Of the network as it is before anything goes."""
    return macs_of(ResNet(blocks))


@cache
def structure_of(blocks: int) -> Structure:
    """Its widths."""
    return find_structure(ResNet(blocks), IMAGES)


@cache
def uniform(share: float, blocks: int) -> Counts:
    """The same share of every width, so that as much of the multiply-accumulates is left."""
    groups = structure_of(blocks).groups

    def at(part: float) -> Counts:
        return {n: max(1, round(g.units * part)) for n, g in groups.items()}

    return at(_largest(lambda part: macs_of(narrow(at(part), blocks)), share * whole_macs(blocks)))


@cache
def _pruner() -> Pruner:
    images = read("train")[0]
    return Pruner(load_resnet20(), images[:1000], images[1000:1500], step=1)


@cache
def planned(share: float) -> Counts:
    """Of the trained ResNet-20: the least sum of the errors that widths were measured to make.

    1,500 images, no labels; each width's least-squares fit and one forward pass a candidate.
    """
    return {name: len(units) for name, units in _pruner().planned(share).items()}


@cache
def ranks_at(share: float) -> Counts:
    """Ranks of ResNet-20's wide kernels, the same share of each one's largest, so that as much is left.

    Raises:
        ValueError: Not even ranks of 1 leave so little.
    """
    probe = Probe.of(*flatten_item(IMAGES, "example"))
    layers = find_layers(ResNet(), None, probe).by_name
    wide = {n: y for n, y in layers.items() if y.sizes.outputs >= 32 and prod(y.kernel) > 1}

    def at(part: float) -> Counts:
        return {n: max(1, round(y.most * part)) for n, y in wide.items()}

    part = _largest(lambda p: macs_of(paired(at(p))), share * whole_macs(SMALL))
    if part == 0.0:
        raise ValueError(f"pairs of the wide kernels alone leave more than {share:.0%}")
    return at(part)


def _largest(cost: Callable[[float], float], budget: float) -> float:
    """The largest part within a budget, to a four-thousandth."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def paired(ranks: Mapping[str, int]) -> nn.Module:
    """ResNet-20 with pairs of rows and columns."""
    model = ResNet()
    for name, rank in ranks.items():
        put_in_place(model, name, blank_pair(model.get_submodule(name), "height", rank))
    return model


def narrow(counts: Mapping[str, int], blocks: int) -> nn.Module:
    """The final architecture, its weights as they are drawn for it."""
    model = ResNet(blocks)
    groups = [g for n, g in structure_of(blocks).groups.items() if n in counts]
    cut_(model, groups, {n: torch.arange(k) for n, k in counts.items()})
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()  # the spread of fresh weights is that of their own sizes
    return model


def fresh(model: nn.Module, old: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same settings with empty states."""
    settings = {k: v for k, v in old.param_groups[0].items() if k != "params"}
    made = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)
    made.param_groups[0].update(settings)
    return made


def kept(values: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Group -> the units with the largest values, ascending."""
    return {n: values[n].topk(k).indices.sort().values for n, k in counts.items()}
