"""Networks for 28 x 28 images, and how many units they keep at a share of their work."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor, nn

from benchmarks.gpu_compress import Vit
from benchmarks.prune import Pruner, read, total_macs
from tersor.capture.module import capture
from tersor.capture.samples import Samples, flatten_item
from tersor.cli.demo.zoo import ResNet
from tersor.core.records import WIDTH_PREFIX
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


@dataclass(frozen=True, slots=True)
class Net:
    """What is trained.

    Attributes:
        kind: "resnet", or "vit" (192 wide, patches of four pixels), of which the feed-forward neurons may go.
        blocks: A stage of the residual network (3: ResNet-20, 9: ResNet-56), or layers of the other.
    """

    kind: str = "resnet"
    blocks: int = SMALL

    def made(self) -> nn.Module:
        """With random weights."""
        return Vit(depth=self.blocks) if self.kind == "vit" else ResNet(self.blocks)

    def optimizer(self, model: nn.Module, rate: float) -> torch.optim.Optimizer:
        """AdamW for the transformer, SGD with momentum for the other."""
        if self.kind == "vit":
            return torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
        return torch.optim.SGD(
            model.parameters(), rate, momentum=0.9, weight_decay=5e-4, nesterov=True
        )

    def left_alone(self, model: nn.Module) -> list[nn.Module]:
        """Layers whose outputs have to stay as many: the classifier, and all of attention."""
        if self.kind == "vit":
            neurons = {layer.up for layer in model.layers}  # type: ignore[union-attr]
            return [m for m in model.modules() if not list(m.children()) and m not in neurons]
        return [m for m in model.modules() if isinstance(m, nn.Linear)]


RESNET20 = Net()


@cache
def whole_macs(net: Net) -> int:
    """Of the network as it is before anything goes."""
    return macs_of(net.made())


@cache
def structure_of(net: Net) -> Structure:
    """Its widths."""
    return find_structure(net.made(), IMAGES)


@cache
def uniform(share: float, net: Net) -> Counts:
    """The same share of every width, so that as much of the multiply-accumulates is left.

    Raises:
        ValueError: What can't go is more than that.
    """
    groups = structure_of(net).groups

    def at(part: float) -> Counts:
        return {n: max(1, round(g.units * part)) for n, g in groups.items()}

    budget = share * whole_macs(net)
    part = _largest(lambda part: macs_of(narrow(at(part), net)), budget)
    if part == 0.0:
        raise ValueError(f"a unit of every width is more than {share:.0%} of the network")
    return at(part)


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


def fitted(counts: Counts) -> nn.Module:
    """The trained ResNet-20 after training: the units that err least stay, what reads them is fitted; no labels.

    The fit folds batch norms into convolutions; here they are apart again, with the statistics of the images
    that it read, so that the network computes the same and trains as any other.
    """
    pruner = _pruner()
    units = {n: g.units for n, g in structure_of(RESNET20).groups.items()}
    cut = {WIDTH_PREFIX + n: k for n, k in counts.items() if k < units[n]}
    graph = pruner.pruned(pruner.kept(cut))
    model = narrow({**units, **counts}, RESNET20)
    values, modules = dict(graph.module.named_buffers()), dict(model.named_modules())
    norms = _norms(model)
    with torch.no_grad():
        for name, norm in norms.items():
            modules[name].weight.copy_(values[f"{name}.weight"])  # type: ignore[union-attr, operator]
            norm.weight.fill_((1 + norm.eps) ** 0.5)
            norm.bias.copy_(values[f"{name}.folded_bias"])
        for name in ("weight", "bias"):
            getattr(model.fc, name).copy_(values[f"fc.{name}"])
    _settle(model.eval(), tuple(norms.values()), read("train")[0][:1000])
    return model


def _norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Convolution -> the norm behind it; they are defined in turn."""
    found, last = {}, ""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            last = name
        elif isinstance(module, nn.BatchNorm2d):
            found[last] = module
    return found


@torch.no_grad()
def _settle(model: nn.Module, norms: tuple[nn.BatchNorm2d, ...], images: Tensor) -> None:
    """Norms that shift alone take the statistics of images, and compute what they did."""
    seen: dict[nn.Module, Tensor] = {}
    handles = [n.register_forward_pre_hook(lambda m, x: seen.update({m: x[0]})) for n in norms]
    model(images)
    for handle in handles:
        handle.remove()
    for norm in norms:
        value = seen[norm]
        mean, variance = value.mean((0, 2, 3)), value.var((0, 2, 3))
        norm.bias += mean
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


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

    part = _largest(lambda p: macs_of(paired(at(p))), share * whole_macs(RESNET20))
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


def narrow(counts: Mapping[str, int], net: Net) -> nn.Module:
    """The final architecture, its weights as they are drawn for it."""
    model = net.made()
    groups = [g for n, g in structure_of(net).groups.items() if n in counts]
    cut_(model, groups, {n: torch.arange(k) for n, k in counts.items()})
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()  # the spread of fresh weights is that of their own sizes
    return model


def fresh(model: nn.Module, old: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same settings with empty states."""
    settings = {k: v for k, v in old.param_groups[0].items() if k != "params"}
    return type(old)([{"params": list(model.parameters()), **settings}])


def kept(values: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Group -> the units with the largest values, ascending."""
    return {n: values[n].topk(k).indices.sort().values for n, k in counts.items()}
