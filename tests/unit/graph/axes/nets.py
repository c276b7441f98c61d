"""Small networks, each with one way for a width to run through ops."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two branches meet in a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 6), (6, 8))
        )
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = F.relu(self.norm(x + self.b(F.gelu(self.a(x)))))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Concatenation, twice, behind norms that nothing folds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 4, 3, padding=1),
            nn.Conv2d(10, 5, 1),
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(10)])
        self.head = nn.Conv2d(15, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.a(self.norms[0](x).relu())], 1)
        x = torch.cat([x, self.b(self.norms[1](x).relu())], 1)
        return self.head(x)


class Shuffle(nn.Module):
    """Halves go different ways and are dealt out again, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 12, 1), nn.Linear(12, 4)
        self.branches = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for branch in self.branches:
            left, right = x.chunk(2, 1)
            x = torch.cat([left, branch(right).relu()], 1)
            b, c, h, w = x.shape
            x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Depthwise convolution and a gate that is not zero at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down, self.up, self.head = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.depthwise(self.stem(x)))
        gate = self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return self.head(x * gate.sigmoid())


class Grouped(nn.Module):
    """Groups of channels stay; the same channel of every group goes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 8, 3, padding=1, groups=4)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.grouped(self.stem(x).tanh())))


class Transposed(nn.Module):
    """A decoder with a skip; transposed convolutions, one of them depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.wide = nn.Conv2d(3, 6, 2, stride=2), nn.Conv2d(6, 8, 1)
        self.up = nn.ConvTranspose2d(8, 5, 2, stride=2)
        self.each = nn.ConvTranspose2d(5, 5, 3, padding=1, groups=5)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.each(self.up(self.wide(self.down(x).relu()).relu()).relu())
        return self.head(torch.cat([x, y], 1))


class FusedAttention(nn.Module):
    """One projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(5, 12), nn.Linear(12, 36), nn.Linear(12, 12)
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, t, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(x)))


class GroupedQueries(nn.Module):
    """Grouped queries, rotary positions, RMS norms, a gated feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.q, self.k, self.v = nn.Linear(16, 24), nn.Linear(16, 12), nn.Linear(16, 12)
        self.o, self.gate, self.up, self.down = (
            nn.Linear(24, 16), nn.Linear(16, 20), nn.Linear(16, 20), nn.Linear(20, 16),
        )  # fmt: skip
        self.norm, self.scale = nn.RMSNorm(16), nn.Parameter(torch.rand(16) + 0.5)
        self.head = nn.Linear(16, 11, bias=False)
        angle = torch.outer(torch.arange(7.0), torch.rand(3))
        self.register_buffer("cos", torch.cat([angle, angle], 1).cos())
        self.register_buffer("sin", torch.cat([angle, angle], 1).sin())

    def rotate(self, x: Tensor) -> Tensor:
        left, right = x[..., :3], x[..., 3:]
        return x * self.cos + torch.cat([-right, left], -1) * self.sin

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, t, _ = x.shape
        y = self.norm(x)
        q, k, v = (m(y).view(b, t, -1, 6).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = self.rotate(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(self.rotate(q), k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, 24))
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))


class CosineAttention(nn.Module):
    """Attention by matrix products, normalised queries and keys, a bias by relative position."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (
            nn.Linear(8, 12),
            nn.Linear(8, 12),
            nn.Linear(8, 12),
            nn.Linear(12, 4),
        )
        self.table = nn.Parameter(torch.randn(13, 3))
        place = torch.arange(7)
        self.register_buffer("place", (place[:, None] - place[None] + 6).reshape(-1))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (m(x).view(b, t, 3, 4).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        bias = self.table[self.place].view(7, 7, 3).permute(2, 0, 1)
        y = (scores + bias.unsqueeze(0)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, t, 12))


class Normed(nn.Module):
    """Group norm with groups, as many groups as channels, and instance norm, in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv3d(1, 6, 3, padding=1), nn.Conv3d(6, 6, 1), nn.Conv3d(6, 6, 1)]
        )
        self.norms = nn.ModuleList([nn.GroupNorm(6, 6), nn.InstanceNorm3d(6, affine=True)])
        self.head = nn.Conv3d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.convs[0](x)).relu()
        x = self.norms[1](self.convs[1](x))
        return self.head(F.leaky_relu(self.convs[2](x)))


class Flattened(nn.Module):
    """A channel becomes a block of inputs; splits of unequal sizes; a gated linear unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.wide = nn.Conv2d(1, 6, 3), nn.Linear(6 * 9, 18)
        self.left, self.right, self.head = nn.Linear(7, 5), nn.Linear(11, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(F.max_pool2d(self.conv(x), 2).flatten(1)).relu()
        left, right = x.split([7, 11], 1)
        return self.head(torch.cat([self.left(left), F.glu(self.right(right))], 1))


class Table(nn.Module):
    """Tied embedding and head, an approximate stream, one exact width inside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(13, 10), nn.LayerNorm(10)
        self.up, self.down = nn.Linear(10, 14), nn.Linear(14, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(x + self.down(self.up(x).square()))
        return F.linear(x, self.embed.weight)


def _images(channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size)


NETS = {
    "residual": (Residual, _images),
    "dense": (Dense, _images),
    "shuffle": (Shuffle, _images),
    "squeeze-excite": (SqueezeExcite, _images),
    "grouped": (Grouped, _images),
    "transposed": (Transposed, _images),
    "fused attention": (FusedAttention, lambda: torch.randn(2, 7, 5)),
    "grouped queries": (GroupedQueries, lambda: torch.randint(0, 11, (2, 7))),
    "cosine attention": (CosineAttention, lambda: torch.randn(2, 7, 8)),
    "normed": (Normed, lambda: torch.randn(2, 1, 4, 4, 4)),
    "flattened": (Flattened, lambda: _images(1)),
    "table": (Table, lambda: torch.randint(0, 13, (2, 7))),
}
