"""Switches of the optimizer: other kernels for the same step, and two other optimizers by name."""

import copy
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tersor.core.errors import ConfigError, MissingDependencyError
from tersor.train.switches import Switch
from tersor.train.tune_steps import Job, Recipe

KERNELS = ("fused", "foreach")
_MATRIX_DIMS = 2


class FusedOptimizer(Switch):
    """The optimizer's step in few kernels: its own flags, changed in place.

    "fused" updates all parameters in one kernel; "foreach" makes one kernel of each operation.
    """

    name = "fused_optimizer"

    def __init__(self, choice: str) -> None:
        self.choice = choice
        self._other = next(k for k in KERNELS if k != choice)
        self._defaults: dict[str, Any] | None = None

    def refusal(self, job: Job, recipe: Recipe) -> str:
        """An optimizer without such kernels, or that has them on."""
        groups, kind = job.optimizer.param_groups, type(job.optimizer).__name__
        if recipe.optimizers[0] is not job.optimizer:
            return (
                f"the optimizer is {type(recipe.optimizers[0]).__name__} now, with its own kernels"
            )
        if any(self.choice not in group for group in groups):
            return f"{kind} has no {self.choice} kernels"
        if all(group[self.choice] for group in groups):
            return "it is on already"
        if all(group.get("fused") for group in groups):
            return "fused kernels are on already"
        if any(group.get("differentiable") for group in groups):
            return "the optimizer's step is differentiable, which such kernels are not"
        is_default = all(group.get("fused") is group.get("foreach") is None for group in groups)
        if self.choice == "foreach" and job.device.type == "cuda" and is_default:
            return "torch takes them by itself on this device"
        return ""

    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        """Groups that are added later follow too."""
        defaults = job.optimizer.defaults
        if self._defaults is None:
            self._defaults = {name: defaults.get(name) for name in KERNELS}
        defaults[self.choice], defaults[self._other] = True, False
        return recipe

    def settle(self, job: Job) -> None:
        """Flags of all groups, and counts of steps where fused kernels read them."""
        optimizer: Any = job.optimizer
        for group in optimizer.param_groups:
            group[self.choice], group[self._other] = True, False
            if self.choice == "fused":
                _move_counts(optimizer, group)
        if self.choice == "fused":  # as its constructor does for fused=True
            optimizer._step_supports_amp_scaling = True  # noqa: SLF001
            optimizer._need_device_dtype_check_for_fused = True  # noqa: SLF001

    def undo(self, job: Job) -> None:
        """The defaults; groups are restored with all else."""
        if self._defaults is not None:
            job.optimizer.defaults.update(self._defaults)
            self._defaults = None


def _move_counts(optimizer: Optimizer, group: dict[str, Any]) -> None:
    for parameter in group["params"]:
        state = optimizer.state.get(parameter, {})
        count = state.get("step")
        if isinstance(count, Tensor):
            state["step"] = count.to(device=parameter.device, dtype=torch.float32)


class Muon(Switch):
    """Hidden matrices by Muon, all else by the caller's Adam.

    The caller's optimizer stays, without those matrices; its rates and weight decay drive both,
    as Muon's steps are scaled to the size of Adam's.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ ; Liu et al. 2025,
    arXiv:2502.16982, section 2.2 (the scale).
    """

    name = "muon"
    changes_convergence = True

    def __init__(self) -> None:
        self._optimizer: Optimizer | None = None
        self._lists: list[
            tuple[list[Any], list[Any]]
        ] = []  # of each group: the list, and its content
        self._links: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def refusal(self, job: Job, recipe: Recipe) -> str:
        """No Muon in this torch, an optimizer with steps of another size, or no hidden matrix."""
        del recipe
        if not hasattr(torch.optim, "Muon"):
            return f"torch {torch.__version__} has no torch.optim.Muon; it came with 2.9"
        if type(job.optimizer) not in (Adam, AdamW):
            return f"its rates are those of Adam or AdamW, the optimizer is {type(job.optimizer).__name__}"
        if job.scaler is not None:
            return "it has no use for a GradScaler; train in bfloat16"
        if not hidden_matrices(job.model, job.optimizer):
            return "the optimizer has no weight of a hidden linear layer"
        return ""

    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        """Matrices move from one optimizer to the other."""
        matrices = {id(p) for p in hidden_matrices(job.model, job.optimizer)}
        groups = []
        for group in job.optimizer.param_groups:
            params = group["params"]
            moved = [p for p in params if id(p) in matrices]
            self._lists.append((params, list(params)))
            params[:] = [p for p in params if id(p) not in matrices]
            if moved:
                decay = group["weight_decay"] if _is_decoupled(job.optimizer) else 0.0
                groups.append({"params": moved, "lr": group["lr"], "weight_decay": decay})
                self._links.append((group, groups[-1]))
        muon = torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw")
        pairs = zip(self._links, muon.param_groups, strict=True)
        self._links = [(link[0], group) for link, group in pairs]
        muon.register_step_pre_hook(lambda *_: self._follow())
        self._optimizer = muon
        return replace(recipe, optimizers=(job.optimizer, muon))

    def _follow(self) -> None:
        """A scheduler drives the caller's groups."""
        for source, group in self._links:
            group["lr"] = source["lr"]

    def settle(self, job: Job) -> None:
        """Both begin with what they own."""
        if self._optimizer is None:
            return
        self._optimizer.state.clear()
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                job.optimizer.state.pop(parameter, None)

    def undo(self, job: Job) -> None:
        """All parameters to the caller's optimizer."""
        del job
        for params, content in self._lists:
            params[:] = content
        self._lists, self._links, self._optimizer = [], [], None


def hidden_matrices(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Weights of all linear layers that an optimizer has, but for the last layer's and embeddings."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    excluded = {id(p) for p in tables} | {id(m.weight) for m in linears[-1:]}
    found: dict[int, Tensor] = {id(m.weight): m.weight for m in linears}
    return [
        p
        for key, p in found.items()
        if key in owned and key not in excluded and p.requires_grad and p.dim() == _MATRIX_DIMS
    ]


def _is_decoupled(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, AdamW)


class ScheduleFree(Switch):
    """The Schedule-Free form of the caller's optimizer, from the package ``schedulefree``.

    It replaces the optimizer and the schedule. Weights are averaged in between: evaluate and save
    inside ``with step.evaluating():``.

    Source: Defazio et al. 2024, arXiv:2405.15682.
    """

    name = "schedule_free"
    changes_convergence = True

    def __init__(self) -> None:
        self._optimizer: Any = None
        self._groups: list[dict[str, Any]] = []

    def refusal(self, job: Job, recipe: Recipe) -> str:
        """An optimizer without such a form."""
        if recipe.optimizers != (job.optimizer,):
            return "another optimizer was asked for as well"
        if job.scaler is not None:
            return "its steps know no GradScaler; train in bfloat16"
        if type(job.optimizer) not in (SGD, Adam, AdamW):
            return f"there is none of {type(job.optimizer).__name__}, only of SGD, Adam and AdamW"
        if any(isinstance(g["lr"], Tensor) for g in job.optimizer.param_groups):
            return "the rate is a tensor, which it does not take"
        if type(job.optimizer) is Adam and any(
            g["weight_decay"] for g in job.optimizer.param_groups
        ):
            return "Adam's weight decay has no such form; use AdamW's"
        return ""

    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        """A new optimizer with the caller's groups, rates and decays."""
        package = import_module("schedulefree")
        groups = [_schedule_free_group(job.optimizer, g) for g in job.optimizer.param_groups]
        is_sgd = type(job.optimizer) is SGD
        kind = package.SGDScheduleFree if is_sgd else package.AdamWScheduleFree
        self._optimizer = kind(groups)
        self._groups = [
            {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            for group in self._optimizer.param_groups
        ]
        return replace(recipe, optimizers=(self._optimizer,))

    def settle(self, job: Job) -> None:
        """From its beginning, in training mode."""
        del job
        self._optimizer.state.clear()
        for group, values in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(copy.deepcopy(values))
        self._optimizer.train()


def _schedule_free_group(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    names = {"lr", "weight_decay", "betas", "eps", "momentum"}
    taken = {name: group[name] for name in names if name in group}
    if isinstance(optimizer, SGD) and not taken["momentum"]:
        del taken["momentum"]  # its own stands for the average and can't be 0
    return {"params": list(group["params"]), **taken}


def require(names: tuple[str, ...], job: Job) -> None:
    """Stop early where a switch that was asked for by name can't be had.

    Raises:
        MissingDependencyError: The package of Schedule-Free is not installed.
        ConfigError: Schedule-Free beside a scheduler.
    """
    if ScheduleFree.name not in names:
        return
    if find_spec("schedulefree") is None:
        raise MissingDependencyError(
            "switches: schedule_free needs the package schedulefree, which is not installed; "
            "pip install schedulefree"
        )
    if job.scheduler is not None:
        raise ConfigError(
            "switches: schedule_free takes the place of a scheduler, and one was given; leave out "
            "scheduler= or schedule_free"
        )
