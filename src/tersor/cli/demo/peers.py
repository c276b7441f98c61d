"""The int8 models of the leading quantizer, NNCF, from the same float model and the same samples.

Its settings are the ones it recommends: a preset, its default smoothing and its fast bias
correction, the transformer scheme where the model is one. Trials with its other settings were
worse (FINDINGS 4).
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from tersor.core.errors import ConfigError, MissingDependencyError

Preset = Literal["MIXED", "PERFORMANCE"]
PRESETS: tuple[Preset, ...] = ("MIXED", "PERFORMANCE")
MOST_SAMPLES = 300  # NNCF's default: it found that more samples do not help


def nncf_models(
    ov_model: Any,
    calibration_arrays: Sequence[Mapping[str, "np.ndarray[Any, np.dtype[Any]]"]],
    presets: Sequence[Preset] = PRESETS,
    *,
    transformer: bool = False,
) -> dict[str, Any]:
    """Quantize a float ``openvino.Model`` to int8 once for each preset.

    Args:
        ov_model: The float model; read only.
        calibration_arrays: One item a call, input name -> array at the model's shapes.
        presets: MIXED keeps activations asymmetric where that helps; PERFORMANCE never does.
        transformer: Use NNCF's scheme for transformers.

    Returns:
        Preset -> quantized ``openvino.Model``.

    Raises:
        ConfigError: No calibration samples.
        MissingDependencyError: NNCF is not installed.
    """
    if not calibration_arrays:
        raise ConfigError("nncf: found no calibration samples, wanted at least one")
    with _quiet():
        nncf = _nncf()
        dataset = nncf.Dataset(list(calibration_arrays))
        return {
            preset: nncf.quantize(
                ov_model.clone(),
                dataset,
                preset=getattr(nncf.QuantizationPreset, preset),
                model_type=nncf.ModelType.TRANSFORMER if transformer else None,
                subset_size=min(len(calibration_arrays), MOST_SAMPLES),
                fast_bias_correction=True,
            )
            for preset in presets
        }


def nncf_version() -> str:
    """Version of NNCF, or an empty text."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("nncf")
    except PackageNotFoundError:
        return ""


def _nncf() -> Any:
    try:
        import nncf
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "nncf is not installed; pip install tersor[demo] to compare with it"
        ) from error
    return nncf


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence progress bars and messages below errors; both come back afterwards."""
    kind = logging.getLoggerClass()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        _nncf()  # its import replaces the class of every later logger, and sets its own level
        logging.setLoggerClass(kind)
        logger = logging.getLogger("nncf")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
