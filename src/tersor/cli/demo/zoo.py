"""The two small convolutional networks that were trained on Fashion-MNIST, 28 x 28, one channel.

Parameter names are those of the checkpoints ``resnet20.safetensors`` and ``lenet5.safetensors``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; the shortcut is a 1x1 convolution where shapes change.

    Source: He et al. 2015, arXiv:1512.03385, figure 2 (projection shortcut).
    """

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inp, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        same = stride == 1 and inp == out
        self.short: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[b, inp, h, w] -> [b, out, h / stride, w / stride]."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.short(x))


class ResNet(nn.Module):
    """A CIFAR-style residual network of 6 n + 2 layers; n = 3 gives ResNet-20."""

    def __init__(self, blocks: int = 3, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        inp = width
        for out, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            for index in range(blocks):
                layers.append(Block(inp, out, stride if index == 0 else 1))
                inp = out
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(inp, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 1, h, w] -> logits [b, 10]."""
        y = functional.relu(self.bn(self.stem(x)))
        logits: Tensor = self.fc(self.layers(y).mean((2, 3)))
        return logits


class LeNet5(nn.Module):
    """The Caffe variant of LeNet-5 with 431 thousand parameters, as in Deep Compression.

    Source: Han et al. 2015, arXiv:1510.00149, table 2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, 20, 5)
        self.c2 = nn.Conv2d(20, 50, 5)
        self.f1 = nn.Linear(800, 500)
        self.f2 = nn.Linear(500, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 1, 28, 28] -> logits [b, 10]."""
        y = functional.max_pool2d(self.c1(x), 2)
        y = functional.max_pool2d(self.c2(y), 2)
        logits: Tensor = self.f2(functional.relu(self.f1(torch.flatten(y, 1))))
        return logits
