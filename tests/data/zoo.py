"""Trained networks for tests; the architectures are those of the demo's cases."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tersor.cli.demo.models import load_checkpoint
from tersor.cli.demo.pictures import Labelled, packed_fashion
from tersor.cli.demo.zoo import LeNet5, ResNet

FOLDER = Path(__file__).parent


def load_resnet20() -> nn.Module:
    """ResNet-20, 0.27 M parameters, evaluation mode; [b, 1, 28, 28] -> [b, 10]."""
    return load_checkpoint(ResNet(), FOLDER / "resnet20.safetensors")


def load_lenet5() -> nn.Module:
    """Caffe LeNet-5, 0.43 M parameters, evaluation mode; [b, 1, 28, 28] -> [b, 10]."""
    return load_checkpoint(LeNet5(), FOLDER / "lenet5.safetensors")


def load_fashion() -> tuple[Labelled, Labelled]:
    """1,200 training and 800 test images of Fashion-MNIST, normalised, with labels."""
    return packed_fashion(FOLDER)


def accuracy(model: nn.Module, data: Labelled) -> float:
    """Share of the images that the model names correctly."""
    with torch.no_grad():
        logits: Tensor = model(data.images)
    return float((logits.argmax(1) == data.labels).double().mean())
