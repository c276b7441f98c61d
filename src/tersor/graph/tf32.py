"""Products of float32 in 19 bits on CUDA devices: on or off for a while, the caller's settings put back.

Torch has two sets of switches. Reading the older one raises where a caller has used the newer one, and
parts of torch read the older one still, so that both are set here, and both are kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["tf32"]


@contextmanager
def tf32(*, enabled: bool) -> Iterator[None]:
    """Products and convolutions of float32 with (``enabled``) or without shortened mantissas.

    Convolutions are shortened by torch's default, products are not: 1e-4 of an output's scale, so that
    what compares float32 outputs runs without.
    """
    products: Any = torch.backends.cuda.matmul
    images: Any = torch.backends.cudnn  # types do not know all of its switches
    switches: tuple[Any, ...] = (products, images.conv, images.rnn)
    newer = [switch.fp32_precision for switch in switches]
    level, flag = _read(torch.get_float32_matmul_precision), _read(lambda: images.allow_tf32)
    products.allow_tf32 = images.allow_tf32 = enabled
    try:
        yield
    finally:
        if level is not None:
            torch.set_float32_matmul_precision(level)
        if flag is not None:
            images.allow_tf32 = flag
        for switch, value in zip(switches, newer, strict=True):
            switch.fp32_precision = value


def _read(older: Any) -> Any:
    """An older switch; None where the caller has set the newer ones to something that it can't say."""
    try:
        return older()
    except RuntimeError:
        return None
