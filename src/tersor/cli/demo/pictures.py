"""Pictures that install offline: Fashion-MNIST, and crops of scikit-image's colour photographs.

A photograph belongs to one part only, all its crops with it: crops of one picture resemble each
other, so they would leak from one part into another. For the same reason a part of 150 crops of
three photographs says less than 150 photographs would; tables give both numbers.
"""

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tersor.core.data import Split
from tersor.core.errors import DataError, MissingDependencyError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
IMAGE_HEADER, LABEL_HEADER = 16, 8  # bytes of the IDX headers
MEAN, DEVIATION = 0.2860, 0.3530  # of the training split's pixels, as the checkpoints were trained

# Left and right eye of one motorcycle are one scene, so they share a part.
PHOTOGRAPHS: Mapping[Split, tuple[str, ...]] = {
    "calibration": ("astronaut.png", "hubble_deep_field.jpg", "ihc.png", "retina.jpg"),
    "search": ("motorcycle_left.png", "motorcycle_right.png"),
    "test": ("chelsea.png", "coffee.png", "rocket.jpg"),
}
CROPS: Mapping[Split, int] = {"calibration": 32, "search": 32, "test": 50}  # of each photograph
SMALLEST_CROP = 0.5  # of the shorter side: the object still fills the picture
SIDE = 224


@dataclass(frozen=True, slots=True)
class Labelled:
    """Normalised images [n, 1, 28, 28] and their classes [n]."""

    images: Tensor
    labels: Tensor


def packed_fashion(folder: Path) -> tuple[Labelled, Labelled]:
    """The 1,200 training and 800 test images that lie beside the checkpoints.

    Raises:
        DataError: The file is not there.
    """
    path = folder / "fashion_mnist_2k.npz"
    if not path.is_file():
        raise DataError(f"{path}: not found; `python tests/data/pack.py` makes it")
    with np.load(path, allow_pickle=False) as arrays:
        train, test = (
            _labelled(arrays[f"{part}_images"], arrays[f"{part}_labels"])
            for part in ("train", "test")
        )
    return train, test


def debian_fashion_test() -> Labelled | None:
    """The whole test split, or None where the package ``dataset-fashion-mnist`` is absent."""
    paths = [DEBIAN / f"t10k-{what}-ubyte.gz" for what in ("images-idx3", "labels-idx1")]
    if not all(path.is_file() for path in paths):
        return None
    pixels, labels = (gzip.decompress(path.read_bytes()) for path in paths)
    return _labelled(
        np.frombuffer(pixels, np.uint8, offset=IMAGE_HEADER).reshape(-1, 28, 28),
        np.frombuffer(labels, np.uint8, offset=LABEL_HEADER),
    )


def _labelled(
    images: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]", labels: object
) -> Labelled:
    pixels = torch.tensor(images, dtype=torch.float32)[:, None]
    return Labelled((pixels / 255 - MEAN) / DEVIATION, torch.tensor(np.asarray(labels).astype(int)))


def photograph_crops(part: Split, seed: int = 0) -> Tensor:
    """The crops of one part, [n, 3, 224, 224]; each photograph's first is its centred square."""
    return torch.cat([_crops(read_photograph(n), CROPS[part], seed) for n in PHOTOGRAPHS[part]])


def read_photograph(name: str) -> Tensor:
    """One of scikit-image's pictures as (pixel - 127) / 128, [1, 3, h, w].

    Raises:
        MissingDependencyError: scikit-image is not installed.
    """
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise MissingDependencyError("scikit-image is not installed; pip install tersor[demo]")
    from skimage.io import imread

    pixels = torch.tensor(imread(Path(spec.origin).parent / "data" / name)[..., :3])
    return (pixels.permute(2, 0, 1)[None].float() - 127) / 128


def centred_square(photograph: Tensor) -> Tensor:
    """The largest centred square at the model's size, [1, 3, 224, 224]."""
    height, width = photograph.shape[-2:]
    side = min(height, width)
    return _cut(photograph, (height - side) // 2, (width - side) // 2, side)


def _crops(photograph: Tensor, count: int, seed: int) -> Tensor:
    """The centred square, then random squares, every other one mirrored."""
    generator = np.random.default_rng(seed)
    height, width = photograph.shape[-2:]
    crops = [centred_square(photograph)]
    for index in range(1, count):
        side = round(min(height, width) * generator.uniform(SMALLEST_CROP, 1))
        top, left = (int(generator.integers(0, n - side + 1)) for n in (height, width))
        crop = _cut(photograph, top, left, side)
        crops.append(crop.flip(-1) if index % 2 else crop)
    return torch.cat(crops)


def _cut(photograph: Tensor, top: int, left: int, side: int) -> Tensor:
    square = photograph[..., top : top + side, left : left + side]
    size = (SIDE, SIDE)
    return functional.interpolate(square, size, mode="bilinear", antialias=True).contiguous()
