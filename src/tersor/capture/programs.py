"""Models as people have them: a module, an exported program, or a file."""

from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from tersor.capture.archive import read_pt2
from tersor.core.errors import CaptureError

Model = nn.Module | torch.export.ExportedProgram

# Argument of each op that says whether it runs as in training.
_TRAINING = {
    torch.ops.aten.dropout.default: 2,
    torch.ops.aten.dropout_.default: 2,
    torch.ops.aten.feature_dropout.default: 2,
    torch.ops.aten.alpha_dropout.default: 2,
    torch.ops.aten.batch_norm.default: 5,
}
_WAYS_OUT = {
    ".onnx": "ONNX files are not read yet; pass the PyTorch model that it was exported from",
    ".tersor": "it is compressed already; pass the original model",
    ".keras": "Keras files are not read yet; pass a PyTorch model",
    ".pt": "it may be a pickle, which runs code; load it yourself and pass the nn.Module",
    ".pth": "it may be a pickle, which runs code; load it yourself and pass the nn.Module",
    ".safetensors": "it holds weights only; load them into the model and pass the nn.Module",
}


def open_model(model: Any) -> Model:
    """What ``capture`` takes, from what the caller has.

    Args:
        model: An ``nn.Module``, an ``ExportedProgram``, or the path of a ``.pt2`` that
            ``torch.export.save`` wrote.

    Raises:
        CaptureError: TorchScript, something else, or a file that can't be read.
    """
    if isinstance(model, nn.Module) and any(map(_is_script, model.modules())):
        raise CaptureError(
            "model: found TorchScript (torch.jit), which can't be exported; wanted the nn.Module "
            "that it was made from: build that, and load its state_dict() into it"
        )
    if isinstance(model, Model):
        return model
    if not isinstance(model, str | Path):
        raise CaptureError(
            f"model: found {type(model).__name__}, wanted a torch.nn.Module, a "
            "torch.export.ExportedProgram or the path of a .pt2"
        )
    path = Path(model)
    if path.suffix == ".pt2":
        return read_pt2(path)
    way_out = _WAYS_OUT.get(path.suffix, "load it and pass the model")
    raise CaptureError(f"{path}: wanted an nn.Module, or the path of a .pt2; {way_out}")


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


def as_module(model: Model) -> nn.Module:
    """A module that can be run and exported.

    Raises:
        CaptureError: A program that was exported in training mode.
    """
    if isinstance(model, nn.Module):
        return model
    exported = model.module(check_guards=False)
    for node in exported.graph.nodes:
        position = _TRAINING.get(node.target)
        if position is not None and len(node.args) > position and node.args[position] is True:
            raise CaptureError(
                f"the program was exported in training mode (node {node.name}); call model.eval() "
                "and export it again"
            )
    # A class of its own: the exported one refuses eval().
    module = fx.GraphModule(exported, exported.graph, class_name="ExportedProgram")
    return module.eval()
