"""What stops a run by name: a model that was changed, gradients that are no numbers, no step at all."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from tersor.core.errors import ConfigError, NumericalError
from tersor.train.counting import all_finite
from tersor.train.groups import Group
from tersor.train.rescue import Rescue
from tersor.train.scores import Scores


def check_shapes(
    seen: Mapping[nn.Parameter, torch.Size], step: int, model: nn.Module | None
) -> None:
    """Refuse to go on with a model that was changed.

    Args:
        seen: Parameter -> its shape when the run began.
        step: For the message.
        model: Has to hold those parameters still; None: not looked at.

    Raises:
        ConfigError: A parameter has another shape, or is in the model no more.
    """
    if model is not None:
        own = {id(p) for p in model.parameters()}
        for parameter, shape in seen.items():
            if id(parameter) not in own:
                raise ConfigError(
                    f"step {step}: a parameter of {tuple(shape)} was taken out of the model after attach(), its layer "
                    "replaced; change the model first and attach then"
                )
    for parameter, shape in seen.items():
        if parameter.shape != shape:
            raise ConfigError(
                f"step {step}: a parameter of {tuple(shape)} has become {tuple(parameter.shape)} after "
                "attach(); change the model first and attach then"
            )


def check_scores(scores: Scores, step: int, rescue: Rescue | None) -> None:
    """Refuse to go on with gradients that are no numbers; reads one value from the device.

    Raises:
        NumericalError: Scores are not finite.
    """
    if not all_finite(list(scores.values.values())):
        bad = [n for n, v in scores.values.items() if not bool(torch.isfinite(v).all())]
        raise NumericalError(
            f"step {step}: the gradients of {', '.join(bad[:3])} are not finite, so that no unit "
            "can be chosen; go back to the last checkpoint, lower the learning rate, or clip gradients"
            f"{'' if rescue is None else rescue.describe()}"
        )


def reader_beside(
    model: nn.Module, names: Sequence[str], shrinking: Sequence[Group]
) -> tuple[str, str] | None:
    """A layer that trains, that ``forward`` does not read, and that may read a width that shrinks.

    The loss calls it by itself, so that nothing is known of what it takes but its size.

    Args:
        model: With the gradients of a step.
        names: Parameters that ``forward`` reads in no mode.
        shrinking: Groups that lose units.

    Returns:
        The parameter and the group; None where there is none.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        parameter = named[name]
        if parameter.grad is None or parameter.dim() < 2:
            continue
        for group in shrinking:
            if parameter.shape[1] == group.units:
                return name, group.name
    return None


def no_steps(step: int, wanted: int) -> str:
    """What to say where ``finish`` comes before anything has happened."""
    return (
        f"finish() after {step} steps: found no look at the scores yet, wanted at least {wanted} steps of the "
        "optimizer that attach() was given; is it the one that trains?"
    )
