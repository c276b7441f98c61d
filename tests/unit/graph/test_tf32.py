"""Torch's switches of float32 products are put back, whichever of its two sets the caller uses."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tersor.graph.tf32 import tf32

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn


def state() -> list[Any]:
    found: list[Any] = [MATMUL.fp32_precision, CUDNN.conv.fp32_precision, CUDNN.rnn.fp32_precision]
    older: tuple[Callable[[], Any], ...] = (
        lambda: MATMUL.allow_tf32,
        lambda: CUDNN.allow_tf32,
        torch.get_float32_matmul_precision,
    )
    for read in older:
        try:
            found.append(read())
        except RuntimeError:
            found.append("mixed")
    return found


def nothing() -> None: ...


def older_on() -> None:
    torch.set_float32_matmul_precision("medium")


def older_off() -> None:
    CUDNN.allow_tf32 = MATMUL.allow_tf32 = False


def newer_on() -> None:
    MATMUL.fp32_precision = "tf32"


def newer_off() -> None:
    CUDNN.conv.fp32_precision = "ieee"


@pytest.fixture
def _defaults() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    CUDNN.allow_tf32 = True
    MATMUL.fp32_precision = "none"


@pytest.mark.usefixtures("_defaults")
@pytest.mark.parametrize("chosen", [nothing, older_on, older_off, newer_on, newer_off])
@pytest.mark.parametrize("enabled", [False, True])
def test_switches_are_set_and_put_back(chosen: Callable[[], None], enabled: bool) -> None:
    chosen()
    before = state()
    with tf32(enabled=enabled):
        inside = state()
        assert inside[0] == ("tf32" if enabled else "ieee")
        assert inside[3:5] == [enabled, enabled], "compilers read the older switches"
    pairs = zip(state(), before, strict=True)
    assert all(now == was for now, was in pairs if was != "mixed")  # what could be read before
