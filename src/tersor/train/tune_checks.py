"""What a caller may hand over: a step with a loss, an optimizer of the model, batches."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tersor.core.errors import ConfigError, NumericalError, ShapeError
from tersor.train.tune_records import TuneReport
from tersor.train.tune_steps import Job, Runner, plain

Switches = str | Sequence[str] | TuneReport


def check_parts(step: Any, model: Any, optimizer: Any) -> None:
    """Types, and whether the optimizer trains the model.

    Raises:
        ConfigError: Something that is no step, model or optimizer, an optimizer that needs a closure,
            one without a parameter of the model, or one whose parameters are all frozen.
    """
    if not callable(step):
        raise ConfigError(f"step: found {type(step).__name__}, wanted step(model, batch) -> loss")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: found {type(model).__name__}, wanted an nn.Module")
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"optimizer: found {type(optimizer).__name__}, wanted a torch.optim.Optimizer"
        )
    if isinstance(optimizer, LBFGS):
        raise ConfigError(
            "optimizer: LBFGS evaluates the loss several times a step; wanted one with "
            "a step() that needs no closure"
        )
    lazy = UninitializedParameter | UninitializedBuffer
    if any(isinstance(t, lazy) for t in (*model.parameters(), *model.buffers())):
        raise ConfigError(
            "model: it has lazy parameters without a shape; run it on one batch first"
        )
    owned = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    shared = [p for p in model.parameters() if id(p) in owned]
    if not shared:
        raise ConfigError(
            f"optimizer: none of its {len(owned)} parameters is one of the model's "
            f"{sum(1 for _ in model.parameters())}; build it from model.parameters() after the model "
            "is on its device"
        )
    if not any(p.requires_grad for p in shared):
        raise ConfigError(
            "model: all parameters that the optimizer has are frozen (requires_grad=False), so there is "
            "nothing to train"
        )


def check_alone(model: nn.Module) -> None:
    """Each process would decide by its own clock.

    Raises:
        ConfigError: The model is wrapped for several processes, or there are several.
    """
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    dist = torch.distributed
    many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if wrapped or many:
        raise ConfigError(
            "model: processes that train together have to switch on the same; tune the bare model in "
            "one process, then pass switches=report to tune() in each"
        )


def check_device(model: nn.Module, device: Any) -> torch.device:
    """The device of the model's parameters, which is that of the step.

    Raises:
        ConfigError: Another one was asked for, or parameters are on several.
    """
    found = {p.device for p in model.parameters()}
    if len(found) > 1:
        names = sorted(map(str, found))
        raise ConfigError(f"model: parameters are on {names}, wanted one device")
    (own,) = found
    if device is None:
        return own
    wanted = torch.device(device)
    if wanted.type != own.type or wanted.index not in (None, own.index):
        raise ConfigError(
            f"device: found {wanted}, and the model is on {own}; move it first "
            f"(model.to({str(wanted)!r})), then build the optimizer"
        )
    return own


def check_companions(optimizer: Optimizer, scheduler: Any, scaler: Any, steps: Any) -> None:
    """Scheduler, scaler and the length of the run.

    Raises:
        ConfigError: A scheduler of another optimizer or one that waits for a metric, a scaler without
            its methods, or steps that are no number of steps.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "scheduler: ReduceLROnPlateau waits for a metric, which a step does not have; leave it out "
            "and call it after each evaluation"
        )
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise ConfigError(f"scheduler: found {type(scheduler).__name__}, wanted one with step()")
    if scheduler is not None and getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ConfigError("scheduler: it drives another optimizer than the one that was given")
    methods = ("scale", "step", "update", "unscale_", "state_dict", "load_state_dict")
    missing = [m for m in methods if not callable(getattr(scaler, m, None))]
    if scaler is not None and missing:
        raise ConfigError(
            f"scaler: found {type(scaler).__name__} without {missing}, wanted a torch.amp.GradScaler"
        )
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ConfigError(
            f"steps: found {steps!r}, wanted the number of steps of the coming run, or None where it "
            "is not known"
        )


def check_first_step(job: Job) -> None:
    """One whole step; whatever it changes has to be put back by the caller.

    Raises:
        ConfigError: What the step returns is no loss, or has no gradient.
        NumericalError: The loss is not finite.
    """

    def checked(model: nn.Module, batch: Any) -> Tensor:
        return _checked_loss(job.step(model, batch))

    Runner(job, replace(plain(job), loss=checked, fits=None))(job.pool.batches[0])


def _checked_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        hint = "; return the loss itself, without .item()" if isinstance(loss, float) else ""
        raise ConfigError(
            f"step: it returned a {type(loss).__name__}, wanted the loss as a tensor of one number{hint}"
        )
    if loss.numel() != 1:
        raise ShapeError(
            f"step: it returned a tensor of shape {list(loss.shape)}, wanted one number; take its mean"
        )
    if not loss.requires_grad:
        raise ConfigError(
            "step: its loss has no gradient; it may be detached, under no_grad, or independent of "
            "every parameter that is trained"
        )
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericalError(
            f"step: the loss of the first batch is {value}, wanted a finite one; check the batch, the "
            "model's initial weights and the loss function before tuning"
        )
    return loss


def chosen_names(
    switches: Any, automatic: Sequence[str], by_name: Sequence[str]
) -> tuple[str, ...]:
    """Names of the switches that are to be tried.

    Raises:
        ConfigError: A name that there is not.
    """
    if switches == "auto":
        return tuple(automatic)
    known = (*automatic, *by_name)
    if isinstance(switches, str) or not isinstance(switches, Iterable):
        raise ConfigError(
            f"switches: found {switches!r}, wanted 'auto', a list of names of {list(known)}, or the "
            "report of an earlier tuning"
        )
    names = tuple(switches)
    for name in names:
        if name == "fp8":
            raise ConfigError(
                "switches: fp8 is never switched on: at the small shapes where steps are slow it is "
                "slower than bf16, and it needs scales of its own; use bf16"
            )
        if name not in known:
            raise ConfigError(f"switches: {name!r} is not known; known are {list(known)}")
    return names
