"""Small networks with branches, and what replacing a branch must compute."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tersor.core.records import Site
from tersor.graph.contracts import Graph, SiteChange
from tersor.graph.edit import execute
from tersor.graph.operators import as_rows
from tersor.graph.residuals import Branch, find_branches
from tests.unit.capturing import graph_of, random, trained


class Block(nn.Module):
    """Two convolutions and a shortcut, which is a convolution of its own where shapes change."""

    def __init__(self, inp: int, out: int, stride: int, kernel: int = 1) -> None:
        super().__init__()
        self.a = nn.Conv2d(inp, out, 3, stride, 1)
        self.b = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or inp != out:
            self.short = nn.Conv2d(inp, out, kernel, stride, kernel // 2, bias=kernel > 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.b(self.a(x).relu()) + self.short(x)).relu()


class Pictures(nn.Module):
    """A stem, a block with an identity, two with projections (1x1, and 3x3 with a bias)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.Sequential(Block(4, 4, 1), Block(4, 6, 2), Block(6, 5, 2, kernel=3))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class One(nn.Module):
    """A branch of one linear map: none is cheaper."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(x).relu()


class Layer(nn.Module):
    """A mixture over tokens, and neurons; the norms before, after, or before without a bias."""

    def __init__(self, width: int, *, after: bool) -> None:
        super().__init__()
        self.mix = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.after = after

    def tokens(self, x: Tensor) -> Tensor:
        return self.mix(x - x.mean(1, keepdim=True))

    def neurons(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.after:
            x = self.n1(x + self.tokens(x))
            return self.n2(x + self.neurons(x))
        x = x + self.tokens(self.n1(x))
        return x + self.neurons(self.n2(x))


class Encoder(nn.Module):
    """Two layers between a linear map and a head."""

    def __init__(self, *, after: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.layers = nn.ModuleList([Layer(6, after=after) for _ in range(2)])
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ChannelsLast(nn.Module):
    """A branch whose last map works on the last dimension of a picture, as ConvNeXt's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 1)
        self.wide = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.wide(x).permute(0, 2, 3, 1)
        y = self.down(functional.gelu(self.up(y))) * self.scale
        return (x + y.permute(0, 3, 1, 2)).tanh()


def pictures() -> Graph:
    return graph_of(trained(Pictures()), random(4, 2, 8, 8))


def encoder(*, after: bool) -> Graph:
    return graph_of(trained(Encoder(after=after)), random(4, 5, 3))


def channels_last() -> Graph:
    return graph_of(trained(ChannelsLast()), random(4, 2, 8, 8))


def made(branch: Branch, site: Site, level: int, seed: int = 7) -> SiteChange:
    """A change with random tensors: what must be computed does not depend on where they are from."""
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(branch.channels, generator=generator, dtype=torch.float64)
    weight = torch.randn(branch.channels, branch.inputs, generator=generator, dtype=torch.float64)
    return SiteChange(site=site, level=level, bias=bias, weight=weight if level == 1 else None)


def overwritten(graph: Graph, changes: Mapping[str, SiteChange]) -> tuple[Tensor, ...]:
    """The original's outputs on its example with y = s + what each change says instead of s + f."""
    branches = {b.add.name: b for b in find_branches(graph) if b.name in changes}
    env: dict[str, Any] = {}
    stream = iter(graph.example)
    with torch.no_grad():
        for node in graph.module.graph.nodes:
            if node.op == "placeholder":
                env[node.name] = next(stream)
                continue
            env[node.name] = execute(graph.module, node, env)
            if node.name in branches:
                branch = branches[node.name]
                instead = _instead(branch, changes[branch.name], env)
                env[node.name] = (env[branch.skip.name].double() + instead).to(env[node.name].dtype)
    return env["output"]


def _instead(branch: Branch, change: SiteChange, env: Mapping[str, Any]) -> Tensor:
    assert change.bias is not None
    y = env[branch.add.name]
    constant = change.bias.reshape(-1, *[1] * (y.dim() - 1 - branch.dim)).expand(y.shape)
    if change.level == 0:
        return constant
    assert change.weight is not None
    if branch.projection is None:
        rows = env[branch.source.name].double().movedim(branch.dim, -1) @ change.weight.T
        return rows.movedim(-1, branch.dim) + constant
    rows = as_rows(env[branch.source.name].double(), branch.projection)
    groups = rows.shape[1]
    weight = change.weight.reshape(groups, -1, rows.shape[2])
    mapped = torch.einsum("tgn,gmn->tgm", rows, weight).reshape(len(rows), -1)
    moved = y.movedim(branch.dim, -1)
    return mapped.reshape(moved.shape).movedim(-1, branch.dim) + constant
