"""Imports torchvision where its compiled operators do not load.

A CPU build of torch cannot load the operators of a CUDA build of torchvision, and importing
torchvision then fails while it registers shapes for ``torchvision::nms``. Only the
post-processing of detectors calls these operators, and the zoo has none of it: a schema without a
kernel is enough to build and run every network. Nothing happens where torchvision imports.
"""

import importlib
import sys
from types import ModuleType

import torch

# What torchvision registers shapes for while it is imported; the others have no such check.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[torch.library.Library] = []  # a library's definitions die with it


def import_torchvision() -> ModuleType:
    """The package, with its models; its compiled operators may lack kernels.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: Its import fails for another reason than a missing operator.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    return importlib.import_module("torchvision")
