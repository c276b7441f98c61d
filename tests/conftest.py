"""Fixtures that more than one folder uses: real trained models and real images."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.checking import check_annotations

check_annotations()

from tests.data.zoo import load_lenet5, load_resnet20  # noqa: E402

DATA = Path(__file__).parent / "data"
MEAN, DEVIATION = 0.2860, 0.3530

# torch builds its trace messages only where somebody listens, and pytest listens to every logger
# that does not propagate: exporting a model would take three times as long.
logging.getLogger("torch.__trace").propagate = True


def pixels(images: np.ndarray) -> Tensor:
    """Bytes [n, 28, 28] as the models' inputs [n, 1, 28, 28]."""
    return torch.from_numpy(images).float().div(255).sub(MEAN).div(DEVIATION).unsqueeze(1)


@pytest.fixture(scope="session")
def images() -> dict[str, Tensor]:
    """Fashion-MNIST: 1,200 training and 800 test images with labels."""
    with np.load(DATA / "fashion_mnist_2k.npz") as packed:
        return {
            "train": pixels(packed["train_images"]),
            "train_labels": torch.from_numpy(packed["train_labels"]).long(),
            "test": pixels(packed["test_images"]),
            "test_labels": torch.from_numpy(packed["test_labels"]).long(),
        }


@pytest.fixture
def resnet20() -> nn.Module:
    """The trained ResNet-20, 1 channel, 94.7 % on Fashion-MNIST."""
    return load_resnet20()


@pytest.fixture
def lenet5() -> nn.Module:
    """The trained Caffe LeNet-5, 431 k parameters."""
    return load_lenet5()
