"""What stages, methods and backends agree on: the graph, statistics, changes and executables."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from tersor.core.records import (
    BackendInfo,
    BuildChoice,
    Candidate,
    Level,
    Signature,
    Site,
    SiteKind,
    Support,
)
from tersor.graph.operators import Window
from tersor.ops.moments import Moments
from tersor.ops.obs import Consumer
from tersor.ops.packed import Packed

Shapes = Mapping[str, tuple[int, ...]]  # input name -> shape of one build; shapes.OPEN: any size
Arrays = Mapping[str, NDArray[Any]]
TensorMap = Callable[[Tensor], Tensor]
GridKind = Literal["integers", "fp8"]


@dataclass(frozen=True, slots=True)
class Graph:
    """A model as one normalised, undecomposed ATen graph in evaluation mode.

    ``module`` takes the flat inputs in the signature's order and returns a tuple of the flat
    outputs. It is never edited in place: ``graph.apply.apply`` returns a new Graph.

    ``packed``: tensor of the module -> the bits that it was expanded from; files hold those.
    """

    module: fx.GraphModule
    signature: Signature
    example: tuple[Tensor, ...]  # flat inputs, batch >= 2
    packed: Mapping[str, Packed] = field(default_factory=dict)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One forward pass without gradients."""
        with torch.no_grad():
            outputs: tuple[Tensor, ...] = self.module(*inputs)
        return outputs

    def parameter_bytes(self) -> int:
        """Bytes of all parameters and buffers, each storage once."""
        tensors = [*self.module.parameters(), *self.module.buffers()]
        seen = {t.untyped_storage().data_ptr(): t for t in tensors}
        return sum(t.numel() * t.element_size() for t in seen.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A bounded sample of what a layer saw: rows of its (unfolded) input and of its output."""

    original: Tensor  # [t, g, n]
    compressed: Tensor  # [t, g, n]; the original where nothing before it is compressed
    output: Tensor  # [t, g, m], the original layer's, bias included


@dataclass(frozen=True, slots=True, kw_only=True)
class Readers:
    """What is true of all the sites that read one tensor, and so share its quantiser.

    Attributes:
        amax: Largest |w| over the readers, for each input channel [c_in].
        weight: All rows of all readers [rows, c_in], float32, where all are linear; else None.
        is_padded: A reader adds zeros at the borders, so that zero must stay zero.
        decided: What methods have decided for all readers at once, by a key of their own.
    """

    amax: Tensor
    is_padded: bool
    weight: Tensor | None = None
    decided: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatistics:
    """What one pass knows about the input of a site's ops.

    Attributes:
        weight: The current weight as [g, m, n], float64; an embedding's table as [1, rows, width].
        bias: The current bias as [g, m], or None.
        moments: Calls up the sums over samples and positions of the raw input.
        channels: A sample of the raw input by channel [t, c_in].
        counts, edges: Histogram of the tensor, over [-max|x|, max|x|].
        low, high: Smallest and largest value of the tensor.
        rows: Calls up the row sample.
        readers: All the sites that read the tensor, this one included.
        is_padded: A reader adds zeros at the borders, so that zero must stay zero.
        channel_dim: The dimension of the tensor that holds the channels.
        window: How a convolution moves over its input; None: linear.
        moments_of: Replays the pass with the compressed tensor mapped by a first function and the
            original one by a second (both before unfolding), in two halves of the samples, to fit
            on one and check on the other; only the transform can do it.
        assumed: What the input's moments are taken to be where no row counts (``ops.assumed``); None:
            nothing is known of it.
        output_moment: Calls up the second moment of the model's gradient at the layer's output
            [g, m, m] (``observe.output_moments``), all ops of the site together; None, or gives None,
            where there is none.
    """

    weight: Tensor
    bias: Tensor | None
    moments: Callable[[], Moments]
    channels: Tensor
    counts: Tensor
    edges: Tensor
    low: float
    high: float
    rows: Callable[[], Rows]
    readers: Readers | None = None
    is_padded: bool = False
    channel_dim: int = -1
    window: Window | None = None
    moments_of: Callable[[TensorMap, TensorMap], tuple[Moments, Moments]] | None = None
    assumed: Callable[[], Moments] | None = None
    output_moment: Callable[[], Tensor | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStatistics:
    """What is known about a width whose dimensions may be mixed inside of every head.

    Attributes:
        first: Stored tensors of the projection of values, or of queries: weight, and bias if any.
        second: Of the projection that reads the values, its weight; of keys, as above.
        sharing: Heads that share one of fewer: readers of a value head, queries of a key head.
        columns: Of values: inputs of the reader that belong to each head and unit [q, d].
        queries: Of scores: second moment of the queries, summed over those of a key head [h, d, d].
        keys: Of scores: covariance of the keys [h, d, d].
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    sharing: int = 1
    columns: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WidthStatistics:
    """What is known about a width before any unit of it goes.

    Attributes:
        consumers: All linear maps that sum over it, from one statistics pass.
        costs: Where none does (experts): the output's error with only that unit removed, one a
            unit [units], by real forwards.
        heads: Where the units of every head may be mixed before any goes.
    """

    consumers: tuple[Consumer, ...] = ()
    costs: Tensor | None = None
    heads: HeadStatistics | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AddStatistics:
    """What is known about the operands of an addition that may be quantised.

    Attributes:
        shared: Tensor -> statistics of a site that reads it too: both find one quantiser.
        own: Tensor -> (counts, edges) of its histogram, where nothing else reads it.
    """

    shared: Mapping[str, SiteStatistics]
    own: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationStatistics:
    """What is known about an activation and the linear layer that alone reads it.

    Attributes:
        function: The function as it is.
        original: Calls up rows of what it reads in the original [t, n].
        compressed: The same rows behind a compressed prefix.
        weight: Of the reader in the original [m, n], float64.
        bias: Of the reader [m], or None.
    """

    function: TensorMap
    original: Callable[[], Tensor]
    compressed: Callable[[], Tensor]
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """How the readers of one tensor see it: (x * inverse_scale + shift) rounded on a grid.

    ``kind``: integers from ``low`` to ``high`` times ``step``, or 8-bit floats (E4M3, ``ops.float8``)
    times ``step``, of which ``low`` and ``high`` are the ends.
    ``inverse_scale`` is None or one factor a channel; ``channel_dim`` is that channel's
    dimension. The reader's weight carries 1 / inverse_scale, its bias the shift.
    """

    step: float
    low: int
    high: int
    inverse_scale: Tensor | None = None
    channel_dim: int = -1
    shift: float = 0.0
    kind: GridKind = "integers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One op of the chain that takes a layer's place; it multiplies with one factor of its weight.

    Attributes:
        weight: In the op's own layout [c_out, c_in, *kernel], or None where there are codes.
        codes: Integer weight in that layout.
        scale: Step for each output channel [c_out].
        bias: [c_out]; the last op's is the change's own.
        quantizer: Of the tensor that the op reads; the first op's is the change's own.
        window: How a convolution moves over its input; None: linear.
    """

    weight: Tensor | None = None
    codes: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    quantizer: Quantizer | None = None
    window: Window | None = None

    def dense(self) -> Tensor:
        """The weight that the op multiplies with, float32."""
        if self.codes is None or self.scale is None:
            assert self.weight is not None  # one of the two is there
            return self.weight.float()
        rows = [-1, *[1] * (self.codes.dim() - 1)]
        return self.codes.float() * self.scale.float().reshape(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteChange:
    """What ``graph.apply`` does at one site.

    Attributes:
        site: The site.
        level: Number format after the change; of a width how many units are kept.
        codes: Integer weight in the weight's own shape, or 8-bit floats; None for a float weight.
        scale: Step for each output channel [c_out] (each row of an embedding).
        weight: A new float weight, where ``codes`` is None.
        packed: A new float weight as the bits that files are to hold; then ``weight`` is None.
        bias: The new bias [c_out], or None to keep it.
        quantizer: The quantiser of the tensor that the ops read, or None.
        kept: Of a width: indices of the units that stay.
        turn: Of a width whose dimensions are mixed before: stored tensor -> map of each head
            [h, d, d]. All maps together change no output; the first dimensions are the ones to keep.
        factors: Ops that take the layer's place, in order, at least two; ``bias`` is the last one's.
        factor: Of an activation: what the values that it reads are multiplied by, and divided by
            behind it; ``weight`` and ``bias`` are then those of the layer that reads it, for
            where nothing else changes that.
        operands: Of an addition: tensor -> the quantiser through which it is read.
        report: What the method did: damping used, losses, settings; JSON values.
    """

    site: Site
    level: Level
    codes: Tensor | None = None
    scale: Tensor | None = None
    weight: Tensor | None = None
    packed: Packed | None = None
    bias: Tensor | None = None
    quantizer: Quantizer | None = None
    kept: Tensor | None = None
    turn: Mapping[str, Tensor] = field(default_factory=dict)
    factors: tuple[Factor, ...] = ()
    factor: float = 1.0
    operands: Mapping[str, Quantizer] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def float_weight(self) -> Tensor | None:
        """The new weight where it is floats in the graph; packed ones are expanded at every call."""
        return self.weight if self.packed is None else torch.from_numpy(self.packed.expand())


@runtime_checkable
class Method(Protocol):
    """Arithmetic on one site; it never edits the graph.

    An attribute ``kinds`` names the kinds of sites that it works on, those of additions as
    "addition", those of activations as "activation", ("format",) where it has
    none; it gets ``SiteStatistics`` of a format, ``WidthStatistics`` of a width and
    ``graph.branches.BranchStatistics`` of a branch. With ``by_name = True`` it is not part of
    ``methods="all"``; with ``for_size = True`` only plans with packed levels come from it, with
    ``gives_ranks = True`` only those with rank levels. ``shares_levels = True``: another method of
    this package has the same levels. A dataclass field ``low_bits`` is false where
    the target has no budget on the size.
    """

    def propose(self, site: Site, statistics: Any) -> Sequence[Candidate]:
        """The candidates at a site, without their measured errors."""
        ...

    def apply(self, site: Site, candidate: Candidate, statistics: Any) -> SiteChange:
        """The change that puts a candidate into effect, for the current weight and statistics."""
        ...


MethodKind = SiteKind | Literal["addition", "activation"]


def kinds_of(method: Method | type[Method]) -> tuple[MethodKind, ...]:
    """The kinds of sites that a method works on."""
    return tuple(getattr(method, "kinds", ("format",)))


def works_on(method: Method, site: Site) -> bool:
    """Whether a site is for a method: where there is no weight, not every format fits."""
    own: dict[str, MethodKind] = {"add": "addition", "activation": "activation"}
    return own.get(site.op_kind, site.kind) in kinds_of(method)


@runtime_checkable
class Executable(Protocol):
    """A built model; takes and returns arrays by name, at the built shapes."""

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """One call."""
        ...

    def profile(self) -> dict[str, float]:
        """Milliseconds a call by graph node (or name of glue), averaged over warm calls.

        What a call takes beside all nodes is ``records.OUTSIDE``.
        """
        ...

    def serialize(self) -> dict[str, bytes]:
        """Sections for the artifact, by file name."""
        ...


@runtime_checkable
class Reshapable(Protocol):
    """What an executable with open sizes offers where its backend builds for single sizes, too."""

    def at(self, shapes: Shapes) -> Executable:
        """The same model compiled for one shape an input; none is open."""
        ...


@runtime_checkable
class Packaging(Protocol):
    """What a backend offers that can put native code of its builds into a file."""

    def for_file(self, choice: BuildChoice, best: BuildChoice) -> Sequence[BuildChoice]:
        """The same build compiled ahead of time, in every way worth measuring; none where it is.

        Args:
            choice: Of the build.
            best: Of the best uncompressed build: what gains there is tried here.
        """
        ...


@runtime_checkable
class Joining(Protocol):
    """What a backend offers that has kernels for several ops at once, in floats alone."""

    def joined(self, graph: Graph, choice: BuildChoice) -> frozenset[str]:
        """Nodes that builds of a choice compute so; no price is asked for other formats of theirs."""
        ...

    def idle(self, graph: Graph, choice: BuildChoice) -> str:
        """Why a choice that asks for such kernels is no build of its own here; empty where it is one."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A compiler or runtime on a device."""

    def describe(self) -> BackendInfo:
        """What it is and can do here."""
        ...

    def supports(self, candidate: Candidate) -> Support:
        """Whether it runs a candidate."""
        ...

    def build(self, graph: Graph, shapes: Shapes, choice: BuildChoice) -> Executable:
        """Compile a graph for these shapes, sizes beyond the batch open where they say so."""
        ...

    def load(self, sections: Mapping[str, bytes], choice: BuildChoice) -> Executable:
        """Compile what ``serialize`` gave."""
        ...
