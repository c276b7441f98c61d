"""Small networks of the kinds that train: convolutions with norms, depthwise ones, transformers."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions with batch norms around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class Convolutional(nn.Module):
    """A stem, two blocks and a head."""

    def __init__(self, width: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(torch.relu(self.norm(self.stem(x))))
        return self.head(y.mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted bottleneck: the depthwise convolution's groups follow its width."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1)
        self.each = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.project = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.hardswish(self.norm(self.each(torch.relu(self.expand(x)))))
        return self.project(y).mean((2, 3))


class Encoder(nn.Module):
    """One layer of a transformer, whose heads are written into its code."""

    def __init__(self, width: int = 16, heads: int = 4, inner: int = 24) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            self.qkv(x).reshape(batch, tokens, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = self.norm1(x + self.out(y.transpose(1, 2).reshape(batch, tokens, width)))
        return self.norm2(x + self.down(nn.functional.gelu(self.up(x))))


def images(count: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of four classes that a small network can tell: a bright quarter each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    x = 0.5 * torch.randn(count, 1, 8, 8, generator=generator)
    for i, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        x[i, :, row : row + 4, column : column + 4] += 1.0
    return x, labels
