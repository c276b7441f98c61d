"""What this device's integer kernels can be trusted with, found by running them.

Without dot-product instructions, pairs of 8-bit products are added in 16 bits and saturate:
with weights up to 127 the result is silently wrong. Codes within +-63 can't overflow
(2 * 255 * 63 < 2**15).
"""

from functools import lru_cache
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

from tersor.backends.openvino.channels_first import enter, leave
from tersor.backends.openvino.executable import core

FULL_LIMIT = 127
SAFE_LIMIT = 63
_CHANNELS, _TOKENS = 64, 32  # large enough that the optimised kernels are chosen
# Exact integer sums (64 * 255 * 127 < 2**24) times one scale: a few float32 roundings.
_ROUNDINGS = 8 * float(np.finfo(np.float32).eps)


@lru_cache(maxsize=1)
def weight_limit() -> int:
    """The largest weight code for which int8 linears and convolutions are exact here."""
    exact = all(
        _is_exact(low, high, as_convolution=as_convolution)
        for low, high in ((-128, 127), (0, 255))
        for as_convolution in (False, True)
    )
    return FULL_LIMIT if exact else SAFE_LIMIT


def _is_exact(low: int, high: int, *, as_convolution: bool) -> bool:
    """All activations and all weights at the top: any saturation shows.

    In single precision: where a processor computes in bfloat16, OpenVINO rounds the result of a convolution to it
    unless it is told otherwise, and that is no saturation.
    """
    model = _model(low, high, as_convolution=as_convolution)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core().compile_model(model, "CPU", settings)
    found = request(np.full((1, _TOKENS, _CHANNELS), high, np.float32))[0]
    wanted = float(_CHANNELS * high * FULL_LIMIT)
    return bool(np.all(np.abs(found - wanted) <= _ROUNDINGS * wanted))


def _model(low: int, high: int, *, as_convolution: bool) -> Any:
    data = op.parameter([1, _TOKENS, _CHANNELS], np.float32)
    source = enter(data.output(0), 3, "enter") if as_convolution else data.output(0)
    ends = [op.constant(np.float32(end)) for end in (low, high, low, high)]
    source = op.fake_quantize(source, *ends, high - low + 1)
    shape = (_CHANNELS, _CHANNELS, 1, 1) if as_convolution else (_CHANNELS, _CHANNELS)
    codes = op.convert(op.constant(np.full(shape, FULL_LIMIT, np.int8)), "f32")
    scale = op.constant(np.ones((_CHANNELS, *[1] * (len(shape) - 1)), np.float32))
    weight = op.multiply(codes, scale)
    if as_convolution:
        product = op.convolution(source, weight, [1, 1], [0, 0], [0, 0], [1, 1])
        result = op.result(leave(product.output(0), 3, "leave"))
    else:
        result = op.result(op.matmul(source, weight, False, True))
    return ov.Model([result], [data], "probe")
