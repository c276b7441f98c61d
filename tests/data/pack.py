"""Pack 2,000 Fashion-MNIST images into one small file: ``python tests/data/pack.py``.

1,200 come from the training split (calibration and search) and 800 from the test split (reports).
Needs the Debian package ``dataset-fashion-mnist``; the same seed gives the same arrays.
"""

import gzip
import sys
from pathlib import Path

import numpy as np

SOURCE = Path("/usr/share/datasets/fashion-mnist")
SIZES = {"train": ("train", 1200), "test": ("t10k", 800)}
SEED = 0
IMAGE_HEADER, LABEL_HEADER = 16, 8  # bytes of the IDX headers


def read(stem: str) -> tuple[np.ndarray, np.ndarray]:
    """One split: images [n, 28, 28] and labels [n], uint8."""
    pixels = gzip.decompress((SOURCE / f"{stem}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((SOURCE / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(pixels, np.uint8, offset=IMAGE_HEADER).reshape(-1, 28, 28)
    return images, np.frombuffer(labels, np.uint8, offset=LABEL_HEADER)


def pack() -> dict[str, np.ndarray]:
    """The packed arrays by key; images keep the order of the original files."""
    generator = np.random.default_rng(SEED)
    arrays = {}
    for part, (stem, count) in SIZES.items():
        images, labels = read(stem)
        chosen = np.sort(generator.choice(len(labels), count, replace=False))
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images[chosen], labels[chosen]
    return arrays


if __name__ == "__main__":
    if not SOURCE.is_dir():
        sys.exit(f"{SOURCE} is missing; apt-get install dataset-fashion-mnist")
    np.savez_compressed(Path(__file__).parent / "fashion_mnist_2k.npz", **pack())
