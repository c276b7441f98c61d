"""Files for other runtimes run on the stock runtimes and compute what the graph computes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import openvino as ov
import pytest
import torch
from torch import Tensor

import tersor
from tersor.backends import openvino
from tests.e2e.helpers import Finished

# A value at the border of two codes may fall to either side; a flip moves an output by a step.
FLIPS = 1e-3
# OpenVINO computes in bf16 by itself where the processor can.
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def check(found: np.ndarray, finished: Finished, batch: Tensor) -> None:
    with torch.no_grad():
        wanted = finished.result.module(batch).numpy()
    difference = np.square(found - wanted).mean() / np.square(wanted).mean()
    assert difference <= FLIPS
    # A flip may decide between two labels that are as good as equal; it decides no other.
    second, first = np.sort(wanted, axis=1)[:, -2:].T
    clear = first - second > 4 * np.sqrt(FLIPS * np.square(wanted).mean())
    assert clear.any()
    assert (found.argmax(1) == wanted.argmax(1))[clear].all()


@pytest.mark.parametrize("size", [1, 5])
def test_openvino_reads_its_own_format(
    finished: Finished, images: dict[str, Tensor], tmp_path: Path, size: int
) -> None:
    path = tmp_path / "x.xml"
    finished.result.export(path)
    compiled = ov.Core().compile_model(ov.Core().read_model(path), "CPU", F32)
    batch = images["test"][:size]
    check(compiled(batch.numpy())[0], finished, batch)


def test_its_eight_bit_linears_are_products(
    finished: Finished, images: dict[str, Tensor], tmp_path: Path
) -> None:
    """OpenVINO computes them wrongly as convolutions where the batch is open and 1."""
    result = finished.result
    choice = replace(result.plan.choice, options={"int8_linear": "convolution"})
    openvino.export_ir(result._final.graph, {}, choice, tmp_path / "x.xml")
    model = ov.Core().read_model(tmp_path / "x.xml")
    assert "Transpose" not in {op.get_type_name() for op in model.get_ordered_ops()}
    batch = images["test"][:1]
    check(ov.Core().compile_model(model, "CPU", F32)(batch.numpy())[0], finished, batch)


def test_onnx_runs_on_onnxruntime_and_on_openvino(
    finished: Finished, images: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "x.onnx"
    finished.result.export(path)
    session = onnxruntime.InferenceSession(path)
    for size in (1, 16):
        batch = images["test"][:size]
        check(session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0], finished, batch)
    batch = images["test"][:4]
    check(ov.Core().compile_model(str(path), "CPU", F32)(batch.numpy())[0], finished, batch)


def test_pt2_is_a_program_of_torch(
    lenet_run: Finished, images: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "x.pt2"
    lenet_run.result.export(path)
    program = torch.export.load(path)
    batch = images["test"][:3]
    found = program.module()(batch)
    check(found.detach().numpy(), lenet_run, batch)


def test_an_artifact_is_exported_without_the_model(
    lenet_run: Finished, lenet_file: Path, images: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "y.xml"
    tersor.export(lenet_file, path)
    batch = images["test"][:2]
    check(ov.Core().compile_model(str(path), "CPU", F32)(batch.numpy())[0], lenet_run, batch)


def test_another_suffix_is_refused(lenet_run: Finished, tmp_path: Path) -> None:
    with pytest.raises(tersor.TersorError, match=r"\.xml, \.onnx, \.pt2"):
        lenet_run.result.export(tmp_path / "x.tflite")
    assert not list(tmp_path.iterdir())
