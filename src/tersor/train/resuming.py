"""The structure comes before the weights: what trainers' checkpoints need so that a cut model loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.train.structure import Structure

VERSION = 1  # of the saved state
FILE = "tersor_structure.safetensors"  # beside a trainer's own files
_TENSOR = "$tensor"  # in the place of a tensor that lies in the file under that name
_STATE = "state"  # the metadata that holds everything else, as JSON


@runtime_checkable
class HasState(Protocol):
    """What is saved and loaded."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and texts."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the structure."""
        ...


def save_state(state: Mapping[str, Any], folder: str | Path) -> Path:
    """Write a state beside a trainer's files, whole or not at all."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    tensors: dict[str, Tensor] = {}
    plain = _plain(state, "", tensors)
    save_file(tensors, part, {_STATE: json.dumps(plain)})
    part.replace(path)
    return path


def _plain(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """A value with names in the place of its tensors, which are collected."""
    if isinstance(value, Tensor):
        tensors[place] = value.detach().cpu().contiguous()
        return {_TENSOR: place}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{place}/{k}", tensors) for k, v in value.items()}
    return value


def _whole(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if set(value) == {_TENSOR}:
        return tensors[value[_TENSOR]]
    return {k: _whole(v, tensors) for k, v in value.items()}


def load_state(folder: str | Path) -> dict[str, Any]:
    """Read a state; a file holds no code.

    Raises:
        ConfigError: There is none in the folder.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise ConfigError(
            f"{path}: found no structure beside the checkpoint, wanted the file that a run with "
            "tersor.train writes; resume from one of its checkpoints"
        )
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        found: dict[str, Any] = _whole(json.loads(file.metadata()[_STATE]), tensors)
    return found


def check_structure(state: Mapping[str, Any], structure: Structure) -> None:
    """Refuse a state of other widths.

    Raises:
        ConfigError: Another version, or widths that differ; names some.
    """
    _check_version(state)
    found = {n: g.units for n, g in structure.groups.items()}
    if state["structure"] != found:
        wrong = sorted(set(state["structure"].items()) ^ set(found.items()))[:4]
        raise ConfigError(
            f"checkpoint: it is of another structure; widths that differ: {wrong}; build the model with "
            "the sizes that it had when the checkpoint's run began, and attach to it"
        )


def _check_version(state: Mapping[str, Any]) -> None:
    if state.get("version") != VERSION:
        raise ConfigError(
            f"checkpoint: found version {state.get('version')!r} of the structure, wanted {VERSION}"
        )


def _check_algorithm(state: Mapping[str, Any], algorithm: str) -> None:
    if state["algorithm"] != algorithm:
        raise ConfigError(
            f"checkpoint: found algorithm {state['algorithm']!r}, wanted {algorithm!r}"
        )


def check_shape(state: Mapping[str, Any], shapes: Mapping[str, str], algorithm: str) -> None:
    """Refuse a state of other layers, or of another algorithm.

    Args:
        state: Of a checkpoint.
        shapes: Layer -> its sizes.
        algorithm: Of the run.

    Raises:
        ConfigError: Another version or algorithm, or layers that differ; names some.
    """
    _check_version(state)
    _check_algorithm(state, algorithm)
    if state["structure"] != dict(shapes):
        wrong = sorted(set(state["structure"].items()) ^ set(shapes.items()))[:4]
        raise ConfigError(
            f"checkpoint: it is of another structure; layers that differ: {wrong}; build the model with "
            "the sizes that it had when the checkpoint's run began, and attach to it"
        )


def check_run(state: Mapping[str, Any], total_steps: int, algorithm: str) -> None:
    """Refuse a state of another schedule or algorithm.

    Raises:
        ConfigError: Says which.
    """
    if state["total_steps"] != total_steps:
        raise ConfigError(
            f"checkpoint: found total_steps={state['total_steps']}, wanted "
            f"{total_steps}: the schedule of the run that is resumed"
        )
    _check_algorithm(state, algorithm)


def check_whole(shard: object) -> None:
    """Refuse to cut a fresh sharded model to a checkpoint's structure.

    Raises:
        ConfigError: There is a function that shards.
    """
    if shard is not None:
        raise ConfigError(
            "load_state_dict: the checkpoint was cut and this model is sharded; attach to the plain "
            "model, load, finish(), and shard what that returns: nothing is left to choose"
        )


def bind(shrinker: HasState, accelerator: Any) -> None:
    """Save a shrinker's state with an accelerator's, and restore it before the weights are loaded."""

    def save(models: Any, weights: Any, output_dir: str) -> None:
        del models, weights
        if accelerator.is_main_process:
            save_state(shrinker.state_dict(), output_dir)

    def load(models: Any, input_dir: str) -> None:
        del models
        shrinker.load_state_dict(load_state(input_dir))

    if not hasattr(accelerator, "register_save_state_pre_hook"):
        raise ConfigError(
            f"bind: found {type(accelerator).__name__}, wanted an accelerate.Accelerator"
        )
    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
