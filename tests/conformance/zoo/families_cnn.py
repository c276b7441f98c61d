"""Convolutional families, each a few layers deep; no two widths that differ in meaning are equal.

Every network takes [b, 3, h, w] unless it says otherwise and returns logits [b, CLASSES].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 7


def conv_bn(inp: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution that keeps the size (divided by the stride), then batch norm."""
    pad = kernel // 2
    conv = nn.Conv2d(inp, out, kernel, stride, pad, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out))


class Head(nn.Module):
    """Mean over space, then a linear layer."""

    def __init__(self, inp: int) -> None:
        super().__init__()
        self.fc = nn.Linear(inp, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[b, inp, *space] -> [b, CLASSES]."""
        logits: Tensor = self.fc(x.flatten(2).mean(2))
        return logits


class Bottleneck(nn.Module):
    """1x1, grouped 3x3, 1x1 and a shortcut. Source: He et al. 2015; Xie et al. 2016 (groups)."""

    def __init__(self, inp: int, mid: int, out: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.reduce = conv_bn(inp, mid, 1)
        self.conv = conv_bn(mid, mid, 3, stride, groups)
        self.expand = conv_bn(mid, out, 1)
        same = stride == 1 and inp == out
        self.short = nn.Identity() if same else conv_bn(inp, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[b, inp, h, w] -> [b, out, h / stride, w / stride]."""
        y = functional.relu(self.conv(functional.relu(self.reduce(x))))
        return functional.relu(self.expand(y) + self.short(x))


def residual() -> nn.Module:
    """Two stages of bottlenecks, the residual stream as one width each."""
    return nn.Sequential(
        conv_bn(3, 14),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        Bottleneck(14, 6, 20, 1),
        Bottleneck(20, 10, 20, 1),
        Bottleneck(20, 12, 26, 2),
        Bottleneck(26, 8, 26, 1),
        Head(26),
    )


def grouped() -> nn.Module:
    """ResNeXt: 4 and 6 groups in the middle convolution."""
    return nn.Sequential(
        conv_bn(3, 14),
        nn.ReLU(),
        Bottleneck(14, 16, 22, 2, groups=4),
        Bottleneck(22, 24, 22, 1, groups=6),
        Head(22),
    )


class DenseLayer(nn.Module):
    """Adds ``growth`` channels to what it reads. Source: Huang et al. 2016."""

    def __init__(self, inp: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inp)
        self.reduce = nn.Conv2d(inp, 10, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(10)
        self.conv = nn.Conv2d(10, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, inp, h, w] -> [b, inp + growth, h, w]."""
        y = self.reduce(functional.relu(self.norm(x)))
        return torch.cat([x, self.conv(functional.relu(self.norm2(y)))], 1)


def dense() -> nn.Module:
    """Two blocks whose layers read everything before them, a transition between."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        *(DenseLayer(8 + 6 * i, 6) for i in range(3)),
        conv_bn(26, 12, 1),
        nn.AvgPool2d(2),
        *(DenseLayer(12 + 5 * i, 5) for i in range(2)),
        nn.BatchNorm2d(22),
        nn.ReLU(),
        Head(22),
    )


class Shuffle(nn.Module):
    """Half the channels pass, half go through a branch; then both interleave.

    Source: Ma et al. 2018, ShuffleNet V2.
    """

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        half = out // 2
        self.split = stride == 1
        self.branch = nn.Sequential(
            conv_bn(inp // 2 if self.split else inp, half, 1),
            nn.ReLU(),
            conv_bn(half, half, 3, stride, half),
            conv_bn(half, half, 1),
            nn.ReLU(),
        )
        self.short: nn.Module = nn.Identity()
        if not self.split:
            self.short = nn.Sequential(conv_bn(inp, inp, 3, stride, inp), conv_bn(inp, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[b, inp, h, w] -> [b, out, h / stride, w / stride]."""
        left, right = x.chunk(2, 1) if self.split else (x, x)
        y = torch.cat([self.short(left), self.branch(right)], 1)
        b, c, h, w = y.shape
        return y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def shuffle() -> nn.Module:
    """Two shuffled stages, so that a second shuffle follows a first."""
    return nn.Sequential(
        conv_bn(3, 12),
        nn.ReLU(),
        Shuffle(12, 24, 2),
        Shuffle(24, 24, 1),
        Shuffle(24, 24, 1),
        Shuffle(24, 32, 2),
        Shuffle(32, 32, 1),
        Head(32),
    )


class Inverted(nn.Module):
    """Wide depthwise convolution with a gate a channel. Source: Howard et al. 2019."""

    def __init__(self, inp: int, mid: int, out: int, stride: int) -> None:
        super().__init__()
        self.expand = conv_bn(inp, mid, 1)
        self.depthwise = conv_bn(mid, mid, 5, stride, mid)
        self.squeeze = nn.Conv2d(mid, 5, 1)
        self.excite = nn.Conv2d(5, mid, 1)
        self.project = conv_bn(mid, out, 1)
        self.keeps = stride == 1 and inp == out

    def forward(self, x: Tensor) -> Tensor:
        """[b, inp, h, w] -> [b, out, h / stride, w / stride]."""
        y = functional.hardswish(self.depthwise(functional.hardswish(self.expand(x))))
        gate = functional.relu(self.squeeze(functional.adaptive_avg_pool2d(y, 1)))
        z: Tensor = self.project(y * functional.hardsigmoid(self.excite(gate)))
        return x + z if self.keeps else z


def mobile() -> nn.Module:
    """Depthwise convolutions and squeeze-excite."""
    return nn.Sequential(
        conv_bn(3, 10, stride=2),
        nn.Hardswish(),
        Inverted(10, 18, 12, 1),
        Inverted(12, 28, 12, 1),
        Inverted(12, 22, 16, 2),
        Head(16),
    )


class Modern(nn.Module):
    """Depthwise 7x7, then an MLP on channels last with a scale. Source: Liu et al. 2022."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[b, width, h, w] -> the same."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        z: Tensor = self.scale * self.down(functional.gelu(self.up(y)))
        return x + z.permute(0, 3, 1, 2)


def modern() -> nn.Module:
    """ConvNeXt."""
    return nn.Sequential(
        nn.Conv2d(3, 14, 4, 4), Modern(14, 40), Modern(14, 36), nn.Conv2d(14, 20, 2, 2),
        Modern(20, 48), Head(20),
    )  # fmt: skip


class UNet(nn.Module):
    """Down, up by transposed convolutions, and what was above is concatenated.

    Source: Ronneberger et al. 2015.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(conv_bn(3, 8), nn.ReLU(), conv_bn(8, 10), nn.ReLU())
        self.second = nn.Sequential(conv_bn(10, 14, stride=2), nn.ReLU())
        self.third = nn.Sequential(conv_bn(14, 22, stride=2), nn.ReLU())
        self.up = nn.ConvTranspose2d(22, 12, 2, 2)
        self.join = nn.Sequential(conv_bn(12 + 14, 16), nn.ReLU())
        self.up2 = nn.ConvTranspose2d(16, 9, 2, 2)
        self.join2 = nn.Sequential(conv_bn(9 + 10, 13), nn.ReLU(), nn.Conv2d(13, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, h, w] -> logits [b, CLASSES, h, w]."""
        a = self.first(x)
        b = self.second(a)
        y = self.up(self.third(b))
        y = self.up2(self.join(torch.cat([y, b], 1)))
        logits: Tensor = self.join2(torch.cat([a, y], 1))
        return logits


class Volume(nn.Module):
    """Three-dimensional convolutions with instance norms and an up path by interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 8, 3, padding=1)
        self.norm = nn.InstanceNorm3d(8, affine=True)
        self.down = nn.Conv3d(8, 14, 3, 2, 1)
        self.norm2 = nn.InstanceNorm3d(14, affine=True)
        self.up = nn.Conv3d(14, 8, 1)
        self.last = nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 1, d, h, w] -> logits [b, 2, d, h, w]."""
        a = functional.leaky_relu(self.norm(self.first(x)), 0.1)
        y = functional.leaky_relu(self.norm2(self.down(a)), 0.1)
        y = functional.interpolate(self.up(y), scale_factor=2, mode="trilinear")
        logits: Tensor = self.last(a + y)
        return logits


class GroupNormed(nn.Module):
    """Statistics over groups of channels: whole groups may go, single channels may not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.GroupNorm(4, 12)
        self.second = nn.Conv2d(12, 20, 3, 2, 1)
        self.norm2 = nn.GroupNorm(5, 20)
        self.third = nn.Conv2d(20, 16, 1)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, h, w] -> [b, CLASSES]."""
        y = functional.silu(self.norm(self.first(x)))
        y = functional.silu(self.norm2(self.second(y)))
        logits: Tensor = self.head(functional.elu(self.third(y)))
        return logits


class Sound(nn.Module):
    """Strided convolutions over time, then a position convolution in groups.

    Source: Baevski et al. 2020, wav2vec 2.0, the encoder without attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 10, 10, 5, bias=False)
        self.norm = nn.GroupNorm(10, 10)
        self.second = nn.Conv1d(10, 14, 3, 2)
        self.third = nn.Conv1d(14, 18, 2, 2)
        self.features = nn.LayerNorm(18)
        self.project = nn.Linear(18, 24)
        self.positions = nn.Conv1d(24, 24, 5, padding=2, groups=4)
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24)
        self.letters = nn.Linear(24, 11)

    def forward(self, x: Tensor) -> Tensor:
        """[b, samples] -> logits [b, frames, 11]."""
        y = functional.gelu(self.norm(self.first(x.unsqueeze(1))))
        y = functional.gelu(self.third(functional.gelu(self.second(y))))
        y = self.project(self.features(y.transpose(1, 2)))
        y = y + functional.gelu(self.positions(y.transpose(1, 2))).transpose(1, 2)
        logits: Tensor = self.letters(y + self.down(functional.gelu(self.up(y))))
        return logits
