"""Switches of CUDA devices: cuDNN's search for kernels, and recorded work."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from tersor.train.switches import Switch, changing_shapes, usual_signature
from tersor.train.switches_optimizer import FusedOptimizer
from tersor.train.tune_batches import leaves, place
from tersor.train.tune_steps import GradientGraph, Job, Recipe, Runner
from tersor.train.tune_update import UpdateGraph, unrecordable


class CudnnBenchmark(Switch):
    """cuDNN times its kernels at the shapes of a step and takes the fastest.

    By itself it takes them by rules: of a step of ResNet-20 in bfloat16 on an H200 two fifths were in two such
    choices. What a thread took for a shape it keeps (torch has no way to forget it), so that the plain step, which
    ran before, decides for the thread that trains; recording has one of its own.
    """

    name = "cudnn_benchmark"
    only_recorded = "a thread keeps what cuDNN took for a shape; recording has a thread of its own"

    def refusal(self, job: Job, recipe: Recipe) -> str:
        """Another device, a model without convolutions, or what is on already."""
        del recipe
        if job.device.type != "cuda":
            return f"cuDNN is for CUDA devices, the step runs on {job.device}"
        if torch.backends.cudnn.benchmark:
            return "it is on already"
        kinds = nn.modules.conv._ConvNd | nn.RNNBase  # noqa: SLF001 - all convolutions
        if not any(isinstance(module, kinds) for module in job.model.modules()):
            return "the model has no convolution"
        return ""

    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        """While forward and backward are recorded: outside of that the flag stays."""
        del job
        return replace(recipe, benchmark=True)


class CudaGraph(Switch):
    """Forward and backward recorded as one CUDA graph."""

    name = "cuda_graph"

    def __init__(self) -> None:
        self._graph: GradientGraph | None = None

    def refusal(self, job: Job, recipe: Recipe) -> str:
        """Another device, shapes that change, or batches with parts that can't be recorded."""
        del recipe
        if job.device.type != "cuda":
            return f"recording is for CUDA devices, the step runs on {job.device}"
        if not job.pool.is_static:
            return changing_shapes(job)
        plain = (Tensor, bool, int, float, str, bytes, type(None))
        for leaf in leaves(job.pool.batches[0]):
            if not isinstance(leaf, plain):
                return (
                    f"a batch holds a {type(leaf).__name__}, which can't be copied to fixed memory"
                )
        return ""

    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        """Records with the first call; parameters have to stay where they are from then on."""
        if self._graph is None:
            batch = job.pool.batches[0]
            placed = place(batch, job.device, channels_last=recipe.channels_last)
            parameters = [p for p in job.model.parameters() if p.requires_grad]
            self._graph = GradientGraph(
                Runner(job, recipe).gradients, parameters, placed, searches=recipe.benchmark
            )
        return replace(recipe, graph=self._graph, fits=usual_signature(job, recipe))


class OptimizerGraph(Switch):
    """The optimizer's step recorded too, behind gradients that are; fused kernels come with it."""

    name = "optimizer_graph"

    def __init__(self) -> None:
        self._fused = FusedOptimizer("fused")
        self._brings_fused = False
        self._graph: UpdateGraph | None = None

    def refusal(self, job: Job, recipe: Recipe) -> str:
        """Gradients that move, a step that Python has to decide about, or another optimizer."""
        if recipe.graph is None:
            return (
                "forward and backward are not recorded, so gradients are somewhere else every time"
            )
        if job.scaler is not None:
            return "the GradScaler decides about each step"
        if recipe.optimizers != (job.optimizer,):
            return "the optimizer is not the caller's own"
        reason = unrecordable(job.optimizer)
        if reason:
            return reason
        missing = self._fused.refusal(job, recipe)
        self._brings_fused = not missing
        return "" if not missing or all(g["fused"] for g in job.optimizer.param_groups) else missing

    def apply(self, job: Job, recipe: Recipe) -> Recipe:
        """Records with the first call, which moves parameters by two steps: a restore has to follow."""
        if self._brings_fused:
            recipe = self._fused.apply(job, recipe)
            self._fused.settle(job)
        if self._graph is None and recipe.graph is not None:
            batch = job.pool.batches[0]
            recipe.graph.replay(place(batch, job.device, channels_last=recipe.channels_last))
            self._graph = UpdateGraph(job.optimizer)
        return replace(recipe, update=self._graph)

    def settle(self, job: Job) -> None:
        """Flags of fused kernels."""
        if self._brings_fused:
            self._fused.settle(job)

    def undo(self, job: Job) -> None:
        """The optimizer's own kernels."""
        if self._brings_fused:
            self._fused.undo(job)
