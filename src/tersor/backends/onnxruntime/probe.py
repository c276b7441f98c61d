"""What this device's integer kernels can be trusted with, found by running them.

Without dot-product instructions, pairs of 8-bit products are added in 16 bits and saturate: with
weights up to 127 the result is silently wrong. Codes within +-63 can't overflow.
"""

from functools import lru_cache

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

FULL_LIMIT = 127
SAFE_LIMIT = 63
_CHANNELS, _ROWS = 64, 32  # large enough that the optimised kernels are chosen


@lru_cache(maxsize=1)
def weight_limit() -> int:
    """The largest weight code for which integer products are exact here."""
    exact = all(_is_exact(kind) for kind in ("MatMulInteger", "ConvInteger"))
    return FULL_LIMIT if exact else SAFE_LIMIT


def _is_exact(kind: str) -> bool:
    """All activations and all weights at the top: any saturation shows."""
    is_conv = kind == "ConvInteger"
    shape = (1, _CHANNELS, _ROWS, 1) if is_conv else (_ROWS, _CHANNELS)
    sizes = (_CHANNELS, _CHANNELS, 1, 1) if is_conv else (_CHANNELS, _CHANNELS)
    weight = numpy_helper.from_array(np.full(sizes, FULL_LIMIT, np.int8), "w")
    zero = numpy_helper.from_array(np.array(0, np.uint8), "z")
    graph = helper.make_graph(
        [helper.make_node(kind, ["x", "w", "z"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        [weight, zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full(shape, 255, np.uint8)})
    return bool(np.all(found == _CHANNELS * 255 * FULL_LIMIT))
