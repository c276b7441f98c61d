"""What constants of an OpenVINO model hold, behind the conversions of types that its frontend writes."""

from typing import Any

import numpy as np

ALIGNING = ("Convert", "ConvertLike")


def is_zero(node: Any) -> bool:
    """Whether a node is a constant of nothing but zeros."""
    while node.get_type_name() in ALIGNING:
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and not np.any(node.get_data())
