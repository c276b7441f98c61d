"""The structure comes before the weights: what trainers' checkpoints need so that a cut model loads."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tersor.core.errors import ConfigError
from tersor.train.schedule import Schedule
from tersor.train.structure import Structure

VERSION = 1  # of the saved state
FILE = "tersor_structure.safetensors"  # beside a trainer's own files
_TENSOR = "$tensor"  # in the place of a tensor that lies in the file under that name
_TUPLE = "$tuple"  # in the place of a tuple, which JSON does not tell from a list
_STATE = "state"  # the metadata that holds everything else, as JSON
_TRAINERS = ("model", "optimizer", "example", "total_steps")  # of attach, which callbacks fill in


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
    """Write a state beside a trainer's files, whole or not at all.

    Args:
        state: Tensors, numbers and texts, nested in mappings, lists and tuples; read only. Tied tensors
            are written once.
        folder: Is made where it is missing.

    Raises:
        ConfigError: Something else is in it; says where.
    """
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    tensors = _Tensors()
    plain = _plain(state, "", tensors)
    save_file(tensors.named, part, {_STATE: json.dumps(plain)})
    part.replace(path)
    return path


@dataclass
class _Tensors:
    """Of one file, in which no two may share memory, as tied weights do."""

    named: dict[str, Tensor] = field(default_factory=dict)
    _places: dict[tuple[Any, ...], str] = field(default_factory=dict)
    _storages: set[int] = field(default_factory=set)

    def add(self, value: Tensor, place: str) -> str:
        """The name that the tensor has in the file: of a tied one, that of the first place."""
        key = (
            value.device, value.untyped_storage().data_ptr(), value.storage_offset(), value.shape,
            value.stride(), value.dtype,
        )  # fmt: skip
        if key in self._places:
            return self._places[key]
        own = value.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in self._storages:  # another part of a flat buffer
            own = own.clone()
        self._storages.add(own.untyped_storage().data_ptr())
        self._places[key] = place
        self.named[place] = own
        return place


def _plain(value: Any, place: str, tensors: _Tensors) -> Any:
    """A value with names in the place of its tensors, which are collected."""
    if isinstance(value, Tensor):
        return {_TENSOR: tensors.add(value, place)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{place}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        rows = [_plain(v, f"{place}/{i}", tensors) for i, v in enumerate(value)]
        return {_TUPLE: rows} if isinstance(value, tuple) else rows
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"{place[1:]}: found {type(value).__name__} in a state that is to be saved, wanted tensors, numbers "
        "and texts; leave it out of the optimizer's groups, or give no rescue= and save with torch.save"
    )


def _whole(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_whole(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_TENSOR}:
        return tensors[value[_TENSOR]]
    if set(value) == {_TUPLE}:
        return tuple(_whole(v, tensors) for v in value[_TUPLE])
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


def course_of(schedule: Schedule) -> dict[str, float]:
    """What a checkpoint has of a schedule beside ``total_steps``: when units die."""
    return {
        "begin": float(schedule.begin),
        "end": float(schedule.end),
        "every": schedule.every,
    }


def check_run(
    state: Mapping[str, Any],
    total_steps: int,
    algorithm: str,
    *,
    schedule: Schedule | None = None,
    counts: Mapping[str, int] | None = None,
) -> None:
    """Refuse a state of another schedule, of other counts or of another algorithm.

    Args:
        state: Of a checkpoint; one without ``schedule`` is from before that was written, and is taken.
        total_steps: Of the run.
        algorithm: Of the run.
        schedule: Of the run; None: only its number of steps is compared.
        counts: That were asked for; None: those of the checkpoint are taken.

    Raises:
        ConfigError: Says which.
    """
    if state["total_steps"] != total_steps:
        raise ConfigError(
            f"checkpoint: found total_steps={state['total_steps']}, wanted "
            f"{total_steps}: the schedule of the run that is resumed"
        )
    _check_algorithm(state, algorithm)
    if schedule is not None:
        _check_course(state.get("schedule"), course_of(schedule))
    if counts is not None and state.get("plan") is not None:
        _check_counts(state["plan"], counts, state["structure"])


def _check_course(found: Mapping[str, float] | None, wanted: Mapping[str, float]) -> None:
    if found is None:
        return
    other = [n for n in wanted if found[n] != wanted[n]]
    if other:
        raise ConfigError(
            f"checkpoint: found a schedule with {', '.join(f'{n}={found[n]}' for n in other)}, wanted "
            f"{', '.join(f'{n}={wanted[n]}' for n in other)} as given to attach; give the schedule of the run "
            "that is resumed, or begin a new run"
        )


def _check_counts(
    plan: Mapping[str, int], counts: Mapping[str, int], sizes: Mapping[str, int | str]
) -> None:
    """A group (or a layer, of ranks) that either leaves out is whole."""
    rows = [(n, plan.get(n, whole), counts.get(n, whole)) for n, whole in sizes.items()]
    other = [row for row in rows if row[1] != row[2]][:4]
    if other:
        found, wanted = {n: a for n, a, _ in other}, {n: b for n, _, b in other}
        raise ConfigError(
            f"checkpoint: found counts={found}, wanted {wanted} as given to attach; give the counts of the run "
            "that is resumed, or begin a new run"
        )


def check_options(
    where: str, options: Mapping[str, Any], attach: Callable[..., Any], own: tuple[str, ...] = ()
) -> None:
    """Refuse options of a trainer's callback that ``attach`` has not, long before it is called.

    Args:
        where: The callback, for messages.
        options: As they were given.
        attach: The function that takes them.
        own: Other options of the callback, for messages.

    Raises:
        ConfigError: Names them, and lists what is allowed.
    """
    known = [n for n in signature(attach).parameters if n not in _TRAINERS]
    wrong = [n for n in options if n not in known]
    if wrong:
        given = [n for n in wrong if n in _TRAINERS]
        raise ConfigError(
            f"{where}: found {', '.join(f'{n}=' for n in wrong)}, wanted options of {', '.join((*own, *known))}"
            f"{f'; the trainer gives {given[0]} itself: leave it out' if given else ''}"
        )


def stage_of(shrinker: Any) -> tuple[bool, bool] | None:
    """Changes where checkpoints from before it don't fit the model any more; None where there is none.

    Units that are chosen count as much as a cut: where the cut waits, weights from before the choice
    would lose units that they were trained with.
    """
    return None if shrinker is None else (shrinker.is_settled, shrinker.is_shrunk)


def forgotten(best: str, step: int) -> str:
    """The note on a trainer's best checkpoint that does not count any more."""
    return (
        f"{best}, the best checkpoint so far, is from before the model's structure was decided at step {step}: "
        "it was forgotten (no file is removed for that), and only later checkpoints count as best"
    )


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
