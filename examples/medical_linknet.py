"""deepbet's brain extraction network as a plain module: ``tersor inspect`` shows what may shrink.

``pip install --no-deps deepbet==1.0.2`` brings its weights, as TorchScript. A scripted module
can't be exported, so this one has the same layers under the same names and takes its tensors:

    tersor inspect examples/medical_linknet.py:model examples/medical_linknet.py:data
"""

from importlib.metadata import files

import torch
from torch import Tensor, nn

WIDTHS = (16, 32, 64, 128)  # channels of the four stages
SIZE = 64  # of the example; the package itself runs 128^3 volumes


def model() -> nn.Module:
    """The network with its trained weights; [b, 1, d, h, w] -> [b, 2, d, h, w], d, h, w of 32 n."""
    network = LinkNet()
    network.load_state_dict(scripted().state_dict())
    return network.eval()


def scripted() -> torch.jit.ScriptModule:
    """What the package ships."""
    path = next(p for p in files("deepbet") or () if p.match("data/models/model.pt"))
    return torch.jit.load(str(path.locate()), map_location="cpu").eval()


def data() -> list[Tensor]:
    """One volume of the mean and the spread that the package scales images to."""
    noise = torch.randn(1, 1, SIZE, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return [0.226 * noise + 0.449]


class LinkNet(nn.Module):
    """3D LinkNet: residual encoder, decoder with sums instead of concatenations."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Conv3d(1, WIDTHS[0], 7, stride=2, padding=3, bias=False)
        pool = nn.MaxPool3d(3, stride=2, padding=1)
        self.init = nn.Sequential(*normed(first, WIDTHS[0]), pool)
        pairs = list(zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False))
        for i, (inp, out) in enumerate(pairs):
            self.add_module(f"down{i}", Down(inp, out, stride=1 if i == 0 else 2))
        for i, (out, inp) in enumerate(reversed(pairs)):
            self.add_module(f"up{i}", Up(inp, out, stride=1 if i == len(pairs) - 1 else 2))
        half = WIDTHS[0] // 2
        wider = nn.ConvTranspose3d(WIDTHS[0], half, 3, stride=2, padding=1, output_padding=1)
        self.tp_conv1 = nn.Sequential(*normed(wider, half))
        self.conv = nn.Sequential(*normed(nn.Conv3d(half, half, 3, padding=1), half))
        self.tp_conv2 = nn.ConvTranspose3d(half, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities of background and brain."""
        skips = [self.init(x)]
        for i in range(len(WIDTHS)):
            skips.append(self.get_submodule(f"down{i}")(skips[-1]))
        y = skips.pop()
        # The sums of the decoder: each stage gives the width of the encoder's stage above it.
        for i, skip in enumerate(reversed(skips[1:])):
            y = self.get_submodule(f"up{i}")(y) + skip
        y = self.get_submodule(f"up{len(WIDTHS) - 1}")(y) + skips[0]
        return self.tp_conv2(self.conv(self.tp_conv1(y))).softmax(1)


class Down(nn.Module):
    """Two residual blocks; the first may halve the resolution."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        self.block1 = Block(inp, out, stride)
        self.block2 = Block(out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[b, inp, d, h, w] -> [b, out, d / stride, h / stride, w / stride]."""
        return self.block2(self.block1(x))


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        first = nn.Conv3d(inp, out, 3, stride=stride, padding=1, bias=False)
        second = nn.Conv3d(out, out, 3, padding=1, bias=False)
        self.double_conv = nn.Sequential(*normed(first, out), *normed(second, out)[:2])
        self.downsample = None
        if inp != out:
            short = nn.Conv3d(inp, out, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(*normed(short, out)[:2])

    def forward(self, x: Tensor) -> Tensor:
        """[b, inp, d, h, w] -> [b, out, d / stride, h / stride, w / stride]."""
        short = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.double_conv(x) + short)


class Up(nn.Module):
    """A quarter of the channels, a transposed convolution, and out again."""

    def __init__(self, inp: int, out: int, stride: int) -> None:
        super().__init__()
        inner = inp // 4
        self.conv1 = nn.Sequential(*normed(nn.Conv3d(inp, inner, 1, bias=False), inner))
        wider = nn.ConvTranspose3d(
            inner, inner, 3, stride=stride, padding=1, output_padding=stride - 1, bias=False
        )
        self.tp_conv = nn.Sequential(*normed(wider, inner))
        self.conv2 = nn.Sequential(*normed(nn.Conv3d(inner, out, 1, bias=False), out))

    def forward(self, x: Tensor) -> Tensor:
        """[b, inp, d, h, w] -> [b, out, d * stride, h * stride, w * stride]."""
        return self.conv2(self.tp_conv(self.conv1(x)))


def normed(conv: nn.Module, out: int) -> list[nn.Module]:
    """A convolution, the norm of each channel over its volume, and ReLU."""
    return [conv, nn.InstanceNorm3d(out), nn.ReLU()]
