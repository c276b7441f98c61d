"""What may be switched on in a training step; each is tried, none is trusted.

A switch changes the recipe of a step and, where it must, layouts and flags in place. All that is
measured goes through ``refusal`` -> ``apply`` -> ``settle`` -> steps -> ``complaint``, and ``undo`` takes
it back. Order matters: what changes types and layouts comes before what compiles and records them.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tersor.train.tune_batches import equal, place, resident, signature
from tersor.train.tune_state import Randomness, generators_of
from tersor.train.tune_steps import Job, Recipe

MEMORY_SHARE = 0.2  # of the device's, that data may take: the rest is for the model and its values
# With all of its kernels in the compiler's cache, ResNet-20 took 6 s of processor time to get ready (torch
# 2.13, one thread); without them longer. A run that is over in less can't gain.
LEAST_COMPILE_SECONDS = 5.0
_COMPARED = 3  # batches, bit by bit
_IMAGE_DIMS = 4


class Switch:
    """One thing that may be on or off; the plain one changes nothing.

    Attributes:
        name: As callers and reports write it.
        choice: Which of several of that name.
        changes_convergence: It trains differently on purpose: never without being asked for by name,
            and then not judged by its loss.
        only_recorded: Why it is tried only in front of a recorded step; "" where it is not so.
    """

    name = "plain"
    choice = ""
    changes_convergence = False
    only_recorded = ""

    def refusal(self, job: Job, recipe: Recipe) -> str:
        """Why it is not even tried beside what is on; "" to try it."""
        del job, recipe
        return ""

    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        """The recipe with it; may change the model or the optimizer in place.

        Called again after ``undo``, and then parameters have to be where they were the first time.
        """
        del job
        return recipe

    def settle(self, job: Job) -> None:
        """Bring a restored optimizer into the form that it needs; called after every restore."""

    def undo(self, job: Job) -> None:
        """Take back what ``apply`` did in place; works after a part of it too."""

    def ready(self) -> None:
        """The first steps are over: what comes now is timed."""

    def complaint(self) -> str:
        """What went wrong while it ran, without an error; "" where nothing did."""
        return ""


class ResidentData(Switch):
    """The whole data set in memory of the device."""

    name = "resident_data"

    def __init__(self) -> None:
        self._batches: Iterable[Any] = ()

    def refusal(self, job: Job, recipe: Recipe) -> str:
        """Data that is too large, there already, or may change from one epoch to the next."""
        del recipe
        found = resident(job.source, job.device, MEMORY_SHARE * job.platform.memory_bytes)
        if found.batches is None:
            return found.reason
        self._batches = found.batches
        return ""

    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        """Batches from there."""
        del job
        return replace(recipe, batches=self._batches)

    def gives_the_same(self, job: Job) -> bool:
        """Whether the first batches are those of the caller's loader, bit for bit."""
        before = Randomness.now(generators_of(job.source))
        try:
            wanted = _first(job.source)
            before.restore()
            found = _first(self._batches)
        finally:
            before.restore()
        return len(wanted) == len(found) and all(map(equal, wanted, found))


def _first(source: Iterable[Any]) -> list[Any]:
    return [batch for batch, _ in zip(source, range(_COMPARED), strict=False)]


class Threads(Switch):
    """Another number of threads on a CPU."""

    name = "threads"

    def __init__(self, count: int) -> None:
        self.count = count
        self.choice = str(count)

    def refusal(self, job: Job, recipe: Recipe) -> str:
        """A GPU, or what is there already."""
        del recipe
        if job.device.type != "cpu":
            return "the step runs on a GPU, which one thread feeds"
        if self.count == torch.get_num_threads():
            return "as it is"
        return ""

    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        """For the step alone: outside of it the number stays."""
        del job
        return replace(recipe, threads=self.count)


def thread_counts(cores: int) -> list[int]:
    """Numbers that are worth trying: all cores, half of them (one of two hardware threads), one."""
    return sorted({cores, max(1, cores // 2), 1} - {torch.get_num_threads()})


class Half(Switch):
    """Forward in bfloat16 where that is safe (autocast); parameters stay as they are."""

    name = "bf16"

    def refusal(self, job: Job, recipe: Recipe) -> str:
        """A device without it, or a step that chooses types itself."""
        del recipe
        if not job.platform.has_bf16:
            return f"{job.platform.name} does not compute in bfloat16"
        if job.scaler is not None:
            return "the step has a GradScaler, so it chooses its types itself"
        if torch.is_autocast_enabled(job.device.type):
            return "autocast is on around the call already"
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in job.model.parameters()):
            return "parameters are in 16 bits already"
        return ""

    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        """Around the loss; backward follows the types of forward."""
        del job
        return replace(recipe, half=True)


class ChannelsLast(Switch):
    """Images and kernels of convolutions with channels innermost."""

    name = "channels_last"

    def __init__(self) -> None:
        self._pairs: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self._hook: Any = None

    def refusal(self, job: Job, recipe: Recipe) -> str:
        """A model without 2-D convolutions."""
        del recipe
        kinds = nn.Conv2d | nn.ConvTranspose2d
        if not any(isinstance(module, kinds) for module in job.model.modules()):
            return "the model has no 2-D convolution"
        return ""

    @torch.no_grad()
    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        """The same parameters in other memory; a state that is loaded later follows."""
        if not self._pairs:
            last = torch.channels_last
            kernels = [p for p in job.model.parameters() if p.dim() == _IMAGE_DIMS]
            self._pairs = [(p, p.data, p.data.contiguous(memory_format=last)) for p in kernels]
        for parameter, _, converted in self._pairs:
            converted.copy_(parameter.data)
            parameter.data = converted
        optimizer = job.optimizer
        self._hook = optimizer.register_load_state_dict_post_hook(lambda _: self._align(optimizer))
        return replace(recipe, channels_last=True)

    @torch.no_grad()
    def settle(self, job: Job) -> None:
        """Moments and gradients as their parameters lie: fused kernels walk through all alike."""
        for parameter, _, _ in self._pairs:
            if parameter.grad is not None:
                gradient = parameter.grad.contiguous(memory_format=torch.channels_last)
                parameter.grad = gradient
        self._align(job.optimizer)

    def _align(self, optimizer: Optimizer) -> None:
        last = torch.channels_last
        for parameter, _, _ in self._pairs:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = value.contiguous(memory_format=last)

    @torch.no_grad()
    def undo(self, job: Job) -> None:
        """The memory of before, with the values of now."""
        del job
        for parameter, original, _ in self._pairs:
            parameter.grad = None  # a gradient of the other layout fits no more
            if parameter.data_ptr() != original.data_ptr():
                original.copy_(parameter.data)
                parameter.data = original
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


class Compiled(Switch):
    """The loss of a batch through ``torch.compile``."""

    name = "compile"

    def __init__(self) -> None:
        self._compiled: Any = None
        self._graphs = 0
        self._settled: int | None = None

    def refusal(self, job: Job, recipe: Recipe) -> str:
        """Shapes that change, or a run that is too short."""
        del recipe
        if not job.pool.is_static:
            return changing_shapes(job)
        if job.steps is None or job.plain_seconds <= 0:
            return ""
        whole = job.steps * job.plain_seconds
        if whole < LEAST_COMPILE_SECONDS:
            return (
                f"the whole run of {job.steps} steps takes {whole:.1f} s, and compiling alone at "
                f"least {LEAST_COMPILE_SECONDS:.0f} s"
            )
        return ""

    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        """Compiles with the first step; batches of another signature take the caller's function."""
        if self._compiled is None:
            self._compiled = torch.compile(recipe.loss, backend=self._backend, dynamic=False)
        return replace(recipe, loss=self._compiled, fits=usual_signature(job, recipe))

    def _backend(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self._graphs += 1
        return compile_fx(graph, inputs)

    def ready(self) -> None:
        """Nothing should be compiled any more."""
        self._settled = self._graphs

    def complaint(self) -> str:
        """Nothing that could be compiled, or something that had to be compiled again and again."""
        if self._settled == 0:
            return "torch.compile found nothing to compile in the step"
        if self._settled is not None and self._graphs > self._settled:
            count = self._graphs - self._settled
            return (
                f"{count} more compilations while steps were timed: shapes or Python values of the "
                "step change"
            )
        return ""


def usual_signature(job: Job, recipe: Recipe) -> Any:
    """Of the batches that a recipe sees, as far as shapes do not change."""
    placed = place(job.pool.batches[0], job.device, channels_last=recipe.channels_last)
    return signature(placed)


def changing_shapes(job: Job) -> str:
    """Says how many shapes there are."""
    count = len(job.pool.batches)
    return (
        f"shapes change: {job.pool.kinds} different ones in {count} batches, wanted one (an epoch's "
        "last batch may differ); pad batches to one size to allow it"
    )
