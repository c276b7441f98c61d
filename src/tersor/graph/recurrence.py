"""Recurrent ops, lowered to ops that every backend has."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def unrolled() -> Iterator[None]:
    """Decompose an LSTM step by step, as torch does with other recurrent ops.

    Where oneDNN is on and no gradient is asked for, torch puts one op of oneDNN in the place of a
    layer (``torch._decomp``), which only torch itself can run.
    """
    with torch.backends.mkldnn.flags(
        enabled=False,
        deterministic=torch._C._get_mkldnn_deterministic(),  # noqa: SLF001 - no public reader
        allow_tf32=torch._C._get_onednn_allow_tf32(),  # noqa: SLF001
        fp32_precision=None,
    ):
        yield
