"""Torch's own kernels and compiler, on the CPU and on CUDA devices: one Backend.

Importing it loads no torch; everything else here needs it, loading included: what a file holds is the
graph, and native code that links against torch.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tersor.core.errors import MissingDependencyError
from tersor.core.records import ADD_PREFIX, BackendInfo, BuildChoice, Candidate, FormatInfo, Support
from tersor.core.support import support_of

if TYPE_CHECKING:  # annotations name these in full, so that run-time type checks find them
    import tersor.backends.inductor.executable
    import tersor.graph.contracts

__all__ = ["InductorBackend"]

Shapes = Mapping[str, tuple[int, ...]]
_NAME = "inductor"
_REMEDY = "pip install 'tersor[compress]'"
_FULL_LIMIT = 127  # products of int8 codes are added in 32 bits
_FLOAT8_CAPABILITY = (8, 9)  # from which on cards multiply 8-bit floats
_COMPILERS = ("c++", "g++", "clang++")


class InductorBackend:
    """Torch and its inductor compiler.

    Args:
        device: cpu, cuda or cuda:N; what ``describe`` is about.

    Attributes:
        by_name: It takes part in ``backend="auto"`` on CUDA devices alone: on a CPU each of the dozens
            of builds that prices need is compiled as C++ for tens of seconds.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.by_name = device == "cpu"

    @classmethod
    def for_device(cls, device: str) -> "InductorBackend":
        """The backend on a device."""
        return cls(device)

    def describe(self) -> BackendInfo:
        """Formats, precisions and uncompressed builds on its device."""
        try:
            installed = version("torch") if find_spec("torch") is not None else ""
        except (PackageNotFoundError, ValueError):  # a module that is there in name only
            installed = ""
        if not installed:
            return BackendInfo(
                name=_NAME,
                available=False,
                device=self.device,
                reason="torch is not installed",
                remedy=_REMEDY,
            )
        kind = self.device.partition(":")[0]
        reason, remedy = self._problem(kind)
        if reason:
            return BackendInfo(
                name=_NAME, available=False, device=self.device, reason=reason, remedy=remedy
            )
        from tersor.backends.inductor.options import float_choices, stored_choices

        has_triton = find_spec("triton") is not None
        can_compile = has_triton if kind == "cuda" else any(map(shutil.which, _COMPILERS))
        folded = "expanded to floats on loading: smaller, not faster"
        return BackendInfo(
            name=_NAME,
            available=True,
            version=installed,
            device=self.device,
            precisions=("f32", "bf16"),
            formats=(
                FormatInfo(name="f32"),
                FormatInfo(name="bf16"),
                FormatInfo(name="int8", weight_limit=_FULL_LIMIT),
                FormatInfo(name="int8_weight", weight_limit=_FULL_LIMIT, note=folded),
                *self._float8(kind),
            ),
            floats=float_choices(kind, can_compile=can_compile),
            stored_choices=stored_choices(kind, has_kernels=has_triton),
        )

    def _float8(self, kind: str) -> tuple[FormatInfo, ...]:
        """8-bit floats, where the card multiplies them."""
        if kind != "cuda":
            return ()
        from tersor.backends.inductor.host import DRIVER, index_of

        has_products = DRIVER.capability(index_of(self.device)) >= _FLOAT8_CAPABILITY
        return (FormatInfo(name="fp8", note="linears alone"),) if has_products else ()

    @property
    def _has_kernels(self) -> bool:
        """Whether kernels of this package run on its device."""
        return self.device.startswith("cuda") and find_spec("triton") is not None

    def _problem(self, kind: str) -> tuple[str, str]:
        """Why the device can't be used and what to do; torch is asked about GPUs alone."""
        if self.device == "cpu":
            return "", ""
        if kind != "cuda":
            return f"it knows no device {self.device!r}", "use cpu, cuda or cuda:N"
        from tersor.backends.inductor.host import problem

        return problem(self.device)

    def supports(self, candidate: Candidate) -> Support:
        """Whether it has the candidate's format; additions of codes are part of 8-bit convolutions."""
        is_addition = candidate.site.startswith(ADD_PREFIX)
        if is_addition and candidate.level not in ("f32", "bf16") and not self._has_kernels:
            return Support(ok=False, reason="inductor computes additions in floats here")
        return support_of(self.describe(), candidate)

    def for_file(self, choice: BuildChoice, best: BuildChoice) -> tuple[BuildChoice, ...]:
        """Builds ahead of time in place of one that compiles again wherever it is loaded.

        Prices are those of the compiler's own mode: a package of the same kernels takes longer to build.
        Where a search for kernels paid on the uncompressed model, one with such a search is tried, too.
        """
        if choice.options.get("mode") not in ("compile", "autotune"):
            return ()
        plain = replace(choice, options={**choice.options, "mode": "package"})
        if "autotune" not in (choice.options.get("mode"), best.options.get("mode")):
            return (plain,)
        return (plain, replace(plain, options={**plain.options, "tuned": True}))

    def joined(self, graph: "tersor.graph.contracts.Graph", choice: BuildChoice) -> frozenset[str]:
        """What blocks and layers that are one op each take in: 8 bits would take them apart again."""
        if choice.options.get("blocks") != "fused":
            return frozenset()
        from tersor.backends.inductor.blocks import block_ops
        from tersor.backends.inductor.encoder import encoder_ops

        is_last = choice.options.get("layout") == "channels_last"
        blocks = block_ops(graph.module) if is_last else frozenset[str]()
        return blocks | encoder_ops(graph.module)

    def idle(self, graph: "tersor.graph.contracts.Graph", choice: BuildChoice) -> str:
        """Why a choice of such kernels makes a build like another of this graph; empty where it does not."""
        if choice.options.get("blocks") != "fused" or self.joined(graph, choice):
            return ""
        return "inductor: blocks='fused', but there is no narrow block and no narrow layer"

    def build(
        self, graph: "tersor.graph.contracts.Graph", shapes: Shapes, choice: BuildChoice
    ) -> "tersor.backends.inductor.executable.InductorExecutable":
        """Build a graph; sizes beyond the batch may stay open (``graph.shapes.OPEN``).

        Raises:
            BackendError: A device that is not here, or a build that fails or has no memory left.
            ConfigError: A device or an option that this backend does not have.
            ShapeError: Shapes that the graph can't take.
        """
        _require()
        from tersor.backends.inductor.executable import InductorExecutable

        return InductorExecutable(graph, shapes, choice)

    def load(
        self, sections: Mapping[str, bytes], choice: BuildChoice
    ) -> "tersor.backends.inductor.executable.InductorExecutable":
        """Build what ``serialize`` gave; native code runs only where this user built it.

        Raises:
            ArtifactError: A section is missing or damaged.
            BackendError: The device is not here, or the graph can't be built on it.
        """
        _require()
        from tersor.backends.inductor.executable import load

        return load(sections, choice)


def _require() -> None:
    if find_spec("torch") is None:
        raise MissingDependencyError(f"torch is not installed; {_REMEDY}")
