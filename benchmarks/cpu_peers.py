"""Peers beside NNCF: ONNX Runtime's own int8, and Torch-Pruning in front of NNCF.

Each from the same float model and samples, with the settings that its documentation recommends
for this processor.
"""

import copy
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from torch import nn

from tersor.cli.demo.compare import FloatModel
from tersor.cli.demo.models import Inputs
from tersor.core.machine import describe_machine
from tersor.core.records import Signature
from tersor.runtime.runner import Runner

Arrays = Mapping[str, "np.ndarray[Any, np.dtype[Any]]"]
OnnxKind = Literal["float", "static int8", "dynamic int8"]
OPSET = 20
STEPS = 60  # in which Torch-Pruning would go to 5 % of each width
MAC_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the original, mildest first
# With these, sums of u8 x s8 products can't saturate.
WITH_PRODUCTS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp")


class OnnxSession:
    """A model file in a stock ONNX Runtime session, by the names of our signature."""

    def __init__(self, model: bytes, outputs: Sequence[str], threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3
        self.size_bytes, self._outputs = len(model), list(outputs)
        self._session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )

    def run(self, inputs: Arrays) -> dict[str, Any]:
        """One call."""
        return dict(zip(self._outputs, self._session.run(None, dict(inputs)), strict=True))


class _Reader:
    """Calibration samples as ONNX Runtime asks for them."""

    def __init__(self, samples: Sequence[Arrays]) -> None:
        self._rest = iter(samples)

    def get_next(self) -> dict[str, Any] | None:
        found = next(self._rest, None)
        return None if found is None else dict(found)


def onnx_models(
    model: nn.Module,
    inputs: Inputs,
    signature: Signature,
    samples: Sequence[Arrays],
    threads: int,
    *,
    transformer: bool = False,
) -> dict[OnnxKind, OnnxSession]:
    """The float model and ONNX Runtime's int8 ones; dynamic for a transformer, as it recommends.

    Args:
        model: The float model.
        inputs: Its arguments, at the batch to build for.
        signature: Of the captured model: names of inputs and outputs.
        samples: Calibration items at the same batch, by those names.
        threads: Of a call.
        transformer: Dynamic as well.
    """
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.getLogger().setLevel(logging.ERROR)  # it warns of every tensor that it leaves alone
    outputs = [spec.name for spec in signature.outputs]
    found: dict[OnnxKind, OnnxSession] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw, ready, made = (folder / f"{n}.onnx" for n in ("raw", "ready", "made"))
        _export(model, inputs, signature, raw)
        quant_pre_process(str(raw), str(ready), skip_symbolic_shape=True)
        found["float"] = OnnxSession(ready.read_bytes(), outputs, threads)
        # Without dot products of 8 bits, sums of two products saturate at 16 bits; ONNX Runtime's
        # documentation then asks for weights of 7 bits.
        reduced = not set(WITH_PRODUCTS) & set(describe_machine().features)
        quantize_static(
            str(ready),
            str(made),
            _Reader(samples),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduced,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            # An attention mask of -3e38 would own the range of what it is added to.
            op_types_to_quantize=["MatMul", "Gemm"] if transformer else None,
        )
        found["static int8"] = OnnxSession(made.read_bytes(), outputs, threads)
        if transformer:
            quantize_dynamic(
                str(ready),
                str(made),
                per_channel=True,
                reduce_range=reduced,
                weight_type=QuantType.QInt8,
            )
            found["dynamic int8"] = OnnxSession(made.read_bytes(), outputs, threads)
    return found


def _export(model: nn.Module, inputs: Inputs, signature: Signature, path: Path) -> None:
    """As PyTorch's own exporter does."""
    torch.onnx.export(
        model,
        () if isinstance(inputs, dict) else inputs,
        str(path),
        kwargs=inputs if isinstance(inputs, dict) else None,
        input_names=[spec.name for spec in signature.inputs],
        output_names=[spec.name for spec in signature.outputs],
        opset_version=OPSET,
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def runner_of(session: OnnxSession, source: FloatModel) -> Runner:
    """A session as a callable with the model's calling convention."""
    return Runner(session, source.graph.signature, source.choice.batch)


def thinner_models(
    model: nn.Module,
    inputs: Inputs,
    shares: Sequence[float] = MAC_SHARES,
    *,
    transformer: bool,
    together: bool = True,
) -> dict[float, nn.Module]:
    """Share of MACs -> the model by Torch-Pruning, no training, batch norm re-estimated.

    Group magnitudes, as it recommends where there are no labels. Of a transformer the inner widths
    of its feed-forward parts, which its dependency graph cuts without help.

    Args:
        model: Copied.
        inputs: Samples, for shapes and for the statistics of batch norms.
        shares: Of the original's MACs.
        transformer: Cut feed-forward parts only.
        together: Rank the units of all layers together, in place of the same share of each.
    """
    import torch_pruning as tp

    model = copy.deepcopy(model)
    example = rows(inputs, 0, 1)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    ignored: list[nn.Module]
    if transformer:
        ends = ("intermediate.dense", "mlp.0")
        inner = {m for n, m in model.named_modules() if n.endswith(ends)}
        ignored = [m for m in layers if m not in inner]
    else:
        ignored = [*[m for m in layers if isinstance(m, nn.Linear)][-1:]]
    base, _ = tp.utils.count_ops_and_params(model, example)
    pruner = tp.pruner.BasePruner(
        model,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.95,
        iterative_steps=STEPS,
        ignored_layers=ignored,
        global_pruning=together,
    )
    found, macs = {}, base
    for share in sorted(shares, reverse=True):
        while macs > base * share and pruner.current_step < STEPS:
            pruner.step()
            macs, _ = tp.utils.count_ops_and_params(model, example)
        found[share] = copy.deepcopy(model).eval()
        _reestimate_(found[share], inputs)
    return found


def rows(inputs: Inputs, start: int, stop: int) -> Any:
    """Some of the samples, as the arguments are nested."""
    if isinstance(inputs, dict):
        return {name: t[start:stop] for name, t in inputs.items()}
    return tuple(t[start:stop] for t in inputs)


def _reestimate_(model: nn.Module, inputs: Inputs) -> None:
    """Batch norm statistics of the calibration images."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()  # not the model: dropout and dropped paths stay off
    assert not isinstance(inputs, dict)
    with torch.no_grad():
        for start in range(0, len(inputs[0]), 32):
            model(*rows(inputs, start, start + 32))
    model.eval()
