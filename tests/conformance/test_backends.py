"""Every backend: describe, build, run, profile, write, read, and integers that are exact."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tersor.analyse.additions import addition_sites
from tersor.analyse.sites import find_sites
from tersor.capture.module import capture
from tersor.capture.samples import Call, Samples, varying
from tersor.core.errors import BackendError, ConfigError, DataError, ShapeError
from tersor.core.jsonable import dumps, from_json
from tersor.core.records import OUTSIDE, BackendInfo, BuildChoice, Candidate, Site, Structure
from tersor.core.registry import BACKENDS, names, resolve
from tersor.graph.apply import apply
from tersor.graph.contracts import (
    Backend,
    Executable,
    Graph,
    Quantizer,
    Reshapable,
    SiteChange,
)
from tersor.graph.edit import attribute
from tersor.graph.operators import WeightedOp, weighted_ops
from tersor.graph.shapes import OPEN

# Float32 sums of at most 1024 products in another order: sqrt(1024) roundings, twice, of 2**-24.
FLOAT = 64 * 2.0**-24
# Integer sums are exact; the scale, the bias and what follows are a few float32 roundings.
INTEGER = 1e-5
STEP = 0.03
OF_TORCH = ("inductor",)  # what torch runs, runs there, and nothing without it


@pytest.fixture(scope="module", params=names(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    instance: Backend = resolve(BACKENDS, request.param)()
    info = instance.describe()
    if not info.available:
        pytest.skip(info.reason)
    return instance


class Weighted(nn.Module):
    """A mean over the length, with the caller's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 8)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = (self.inner(x) * weights.unsqueeze(-1)).sum(1) / weights.shape[1]
        return y


def graph_of(module: nn.Module, *inputs: Tensor) -> Graph:
    leaf = Structure(kind="tensor")
    args = Structure(kind="tuple", children=tuple(leaf for _ in inputs))
    return capture(module, Samples(Call(args, Structure(kind="dict")), inputs)).graph


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off_the_borders(*shape: int, seed: int = 0) -> Tensor:
    """Values that no rounding error moves to another code: at most 0.4 from a multiple of STEP."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-150, 151, shape, generator=generator)
    return (codes + 0.8 * torch.rand(shape, generator=generator) - 0.4) * STEP


def seeded(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(random(*p.shape, seed=i + 1) * 0.1)
    return module.eval()


def choices(backend: Backend, **fields: Any) -> list[BuildChoice]:
    info = backend.describe()
    return [BuildChoice(backend=info.name, options=o, **fields) for o in info.choices or ({},)]


def named(graph: Graph, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    specs = graph.signature.inputs
    return {s.name: t.numpy() for s, t in zip(specs, inputs, strict=True)}


def built(
    backend: Backend, graph: Graph, inputs: tuple[Tensor, ...], choice: BuildChoice
) -> Executable:
    shapes = {s.name: tuple(t.shape) for s, t in zip(graph.signature.inputs, inputs, strict=True)}
    return backend.build(graph, shapes, choice)


def assert_close(
    graph: Graph, executable: Executable, inputs: tuple[Tensor, ...], tolerance: float
) -> None:
    found = executable.run(named(graph, inputs))
    wanted = graph.run(inputs)
    assert list(found) == [s.name for s in graph.signature.outputs]
    for spec, tensor in zip(graph.signature.outputs, wanted, strict=True):
        array = tensor.numpy()
        assert found[spec.name].shape == array.shape
        assert found[spec.name].dtype == array.dtype
        error = np.abs(found[spec.name].astype(np.float64) - array).max(initial=0.0)
        assert error <= tolerance * np.abs(array).max(initial=1e-30), spec.name


def change(op: WeightedOp, graph: Graph, level: str, limit: int) -> SiteChange:
    """Symmetric codes with one scale a row, and a fixed grid on the activation."""
    weight = attribute(graph.module, str(op.weight.target)).detach()
    scale = weight.abs().flatten(1).amax(1) / limit
    codes = (weight / scale.reshape(-1, *[1] * (weight.dim() - 1))).round()
    quantizer = None
    if level == "int8" and op.kind != "embedding":
        quantizer = Quantizer(step=STEP, low=-128, high=127)
    site = Site(
        name=op.node.name,
        kind="format",
        ops=(op.node.name,),
        op_kind=op.kind,  # type: ignore[arg-type]
        weight=str(op.weight.target),
        shape=tuple(weight.shape),
    )
    return SiteChange(
        site=site, level=level, codes=codes.to(torch.int8), scale=scale, quantizer=quantizer
    )


def compressed(graph: Graph, level: str, limit: int) -> Graph:
    return apply(graph, [change(op, graph, level, limit) for op in weighted_ops(graph.module)])


def int8_limit(backend: Backend) -> int:
    info = backend.describe().format("int8")
    if info is None:
        pytest.skip("no int8 on this device")
    return info.weight_limit


class Mixed(nn.Module):
    """Integer and float inputs, one unused; outputs: shared weights, a scalar, a view, an input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, x: Tensor, unused: Tensor) -> tuple[Tensor, ...]:
        del unused
        h = self.table(ids) + x
        return self.head(h), h.transpose(1, 2), ids + 1, x


class Block(nn.Module):
    """What a transformer's feed-forward part looks like, with a division as embeddings have."""

    def __init__(self, width: int = 16, inner: int = 48) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.down(nn.functional.gelu(self.up(x))) + x)
        return out / out.norm(dim=-1, keepdim=True)


@pytest.fixture(scope="module")
def mixed() -> tuple[Graph, tuple[Tensor, ...]]:
    inputs = (torch.arange(20).reshape(4, 5) % 11, random(4, 5, 8), random(4, 3))
    return graph_of(seeded(Mixed()), *inputs), inputs


@pytest.fixture(scope="module")
def block() -> tuple[Graph, tuple[Tensor, ...]]:
    inputs = (random(4, 7, 16),)
    return graph_of(seeded(Block()), *inputs), inputs


def test_describes_itself(backend: Backend) -> None:
    info = backend.describe()
    assert info == from_json(BackendInfo, json.loads(dumps(info)))
    assert info.version
    assert info.format("f32") is not None
    assert "f32" in info.precisions
    limits = [f.weight_limit for f in info.formats if f.name.startswith("int8")]
    assert all(1 <= limit <= 127 for limit in limits)


def test_supports_what_it_describes(backend: Backend) -> None:
    info = backend.describe()
    for level in ("f32", "bf16", "int8", "int8_weight"):
        candidate = Candidate(site="s", level=level, method="m", size_bytes=1)  # type: ignore[arg-type]
        support = backend.supports(candidate)
        assert support.ok == (info.format(level) is not None)  # type: ignore[arg-type]
        assert support.ok or level in support.reason


@pytest.mark.parametrize("batch", [1, 3])
def test_float_build_computes_the_graph(
    backend: Backend, mixed: tuple[Graph, tuple[Tensor, ...]], batch: int
) -> None:
    graph, inputs = mixed
    some = tuple(t[:batch] for t in inputs)
    for choice in choices(backend, batch=batch):
        assert_close(graph, built(backend, graph, some, choice), some, FLOAT)


class Tagger(nn.Module):
    """A recurrent layer that starts from nothing; its sizes appear in the op that makes the start."""

    def __init__(self, inner: nn.RNNBase) -> None:
        super().__init__()
        self.inner = inner
        units = (inner.proj_size or inner.hidden_size) * (1 + inner.bidirectional)
        self.last = nn.Linear(units, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, states = self.inner(x if self.inner.batch_first else x.transpose(0, 1))
        last = states if isinstance(states, tuple) else (states,)
        return self.last(y.sum(1 if self.inner.batch_first else 0)), *(s.sum(0) for s in last)


RECURRENT: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True),
    "lstm one way": lambda: nn.LSTM(6, 8, bias=False),
    "lstm projected": lambda: nn.LSTM(6, 8, batch_first=True, proj_size=4),
    "gru": lambda: nn.GRU(6, 8, 2, batch_first=True, bidirectional=True),
    "gru one way": lambda: nn.GRU(6, 8, bias=False),
    "rnn": lambda: nn.RNN(6, 8, 2, batch_first=True, bidirectional=True),
    "relu": lambda: nn.RNN(6, 8, nonlinearity="relu", bias=False),
}


@pytest.mark.parametrize("layer", RECURRENT)
def test_recurrent_layers(backend: Backend, layer: str) -> None:
    inputs = (random(3, 4, 6),)
    graph = graph_of(seeded(Tagger(RECURRENT[layer]())), *inputs)
    enabled = torch.backends.mkldnn.enabled
    some = (inputs[0][:2],)
    assert_close(graph, built(backend, graph, some, choices(backend, batch=2)[0]), some, FLOAT)
    assert torch.backends.mkldnn.enabled == enabled


def test_ops_that_write_to_their_own_values(backend: Backend) -> None:
    class Alike(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cosine_similarity(x, y)

    inputs = (random(2, 5), random(2, 5, seed=1))
    graph = graph_of(Alike(), *inputs)
    assert_close(graph, built(backend, graph, inputs, choices(backend)[0]), inputs, FLOAT)


class Windows(nn.Module):
    """Attention inside of windows, which are cut out of a picture and put back, without heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.three, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        b, c, h, w = y.shape
        parts = y.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        query, key, value = self.three(parts).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        back = mixed.view(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
        z: Tensor = self.last((y + back).mean((2, 3)))
        return z


def test_windows_of_attention(backend: Backend) -> None:
    inputs = (random(3, 3, 8, 8),)
    graph = graph_of(seeded(Windows()), *inputs)
    some = (inputs[0][:2],)
    assert_close(graph, built(backend, graph, some, choices(backend, batch=2)[0]), some, FLOAT)


def test_mish_behind_a_linear_layer(backend: Backend) -> None:
    inputs = (random(2, 8) * 20,)
    graph = graph_of(seeded(nn.Sequential(nn.Linear(8, 16), nn.Mish(), nn.Linear(16, 4))), *inputs)
    assert_close(graph, built(backend, graph, inputs, choices(backend)[0]), inputs, FLOAT)


class Extremes(nn.Module):
    """The largest and smallest of all steps, each alone in front of a layer, and side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.both = nn.Linear(24, 3), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        high, low = x.amax(1), x.amin(1)
        return self.high(high), self.both(torch.cat([high, low.relu()], 1))


def test_int8_behind_a_maximum(backend: Backend) -> None:
    inputs = (off_the_borders(3, 7, 24),)
    graph = compressed(graph_of(seeded(Extremes()), *inputs), "int8", int8_limit(backend))
    for choice in choices(backend):
        assert_close(graph, built(backend, graph, inputs, choice), inputs, INTEGER)


def test_scalar_output(backend: Backend) -> None:
    class Total(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.tanh(), x.square().mean()

    inputs = (random(2, 3),)
    graph = graph_of(Total(), *inputs)
    assert_close(graph, built(backend, graph, inputs, choices(backend)[0]), inputs, FLOAT)


def test_outputs_belong_to_the_caller_and_inputs_are_untouched(
    backend: Backend, block: tuple[Graph, tuple[Tensor, ...]]
) -> None:
    graph, inputs = block
    executable = built(backend, graph, inputs, choices(backend)[0])
    arrays = named(graph, inputs)
    before = {k: v.copy() for k, v in arrays.items()}
    first = executable.run(arrays)
    kept = {k: v.copy() for k, v in first.items()}
    executable.run({k: v + 1 for k, v in arrays.items()})
    assert all(np.array_equal(first[k], kept[k]) for k in first)
    assert all(np.array_equal(arrays[k], before[k]) for k in arrays)


def test_read_only_and_strided_inputs(
    backend: Backend, block: tuple[Graph, tuple[Tensor, ...]]
) -> None:
    graph, inputs = block
    executable = built(backend, graph, inputs, choices(backend)[0])
    (name, array), *_ = named(graph, inputs).items()
    wanted = executable.run({name: array})
    strided = np.asfortranarray(array)
    strided.flags.writeable = False
    found = executable.run({name: strided})
    assert all(np.array_equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("level", ["f32", "int8"])
def test_round_trip_gives_identical_outputs(
    backend: Backend, block: tuple[Graph, tuple[Tensor, ...]], level: str
) -> None:
    graph, inputs = block
    if level == "int8":
        graph = compressed(graph, level, int8_limit(backend))
    for choice in choices(backend):
        executable = built(backend, graph, inputs, choice)
        sections = executable.serialize()
        assert sections == built(backend, graph, inputs, choice).serialize()
        loaded = backend.load(sections, choice)
        wanted = executable.run(named(graph, inputs))
        found = loaded.run(named(graph, inputs))
        assert all(np.array_equal(found[k], wanted[k]) for k in wanted)
        assert loaded.serialize() == sections


def test_loads_without_torch(
    backend: Backend, block: tuple[Graph, tuple[Tensor, ...]], tmp_path: Path
) -> None:
    if backend.describe().name in OF_TORCH:
        pytest.skip("torch is its runtime")
    graph, inputs = block
    choice = choices(backend)[-1]
    executable = built(backend, graph, inputs, choice)
    for name, data in executable.serialize().items():
        (tmp_path / name).write_bytes(data)
    np.savez(tmp_path / "inputs.npz", **named(graph, inputs))
    script = f"""
import sys, pathlib, numpy as np
sys.modules["torch"] = None  # importing it raises
from tersor.core.jsonable import from_json
from tersor.core.records import BuildChoice
from tersor.core.registry import BACKENDS, resolve
import json
folder = pathlib.Path({str(tmp_path)!r})
choice = from_json(BuildChoice, json.loads({dumps(choice)!r}))
sections = {{p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".npz"}}
executable = resolve(BACKENDS, choice.backend)().load(sections, choice)
outputs = executable.run(dict(np.load(folder / "inputs.npz")))
np.savez(folder / "outputs.npz", **outputs)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    wanted = executable.run(named(graph, inputs))
    with np.load(tmp_path / "outputs.npz") as found:
        assert all(np.array_equal(found[k], wanted[k]) for k in wanted)


def test_profile_names_the_ops_and_sums_to_the_latency(backend: Backend) -> None:
    inputs = (random(2, 64, 256),)
    graph = graph_of(seeded(Block(256, 1024)), *inputs)
    executable = built(backend, graph, inputs, choices(backend)[0])
    arrays = named(graph, inputs)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        executable.run(arrays)
        times.append(1e3 * (time.perf_counter() - start))
    profile = executable.profile()
    ops = {op.node.name for op in weighted_ops(graph.module)}
    assert ops <= set(profile)
    nodes = sum(profile.values()) - profile[OUTSIDE]
    assert profile[OUTSIDE] >= 0
    assert sum(profile[name] for name in ops) >= 0.5 * nodes
    # Another process on the same cores can slow either measurement down several times.
    assert 0.2 <= sum(profile.values()) / statistics.median(times) <= 5


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear, 2 dimensions": (lambda: nn.Linear(32, 24), (4, 32)),
    "linear, 3 dimensions": (lambda: nn.Linear(32, 24), (4, 7, 32)),
    "linear, 4 dimensions": (lambda: nn.Linear(32, 24, bias=False), (4, 2, 3, 32)),
    "linear, 5 dimensions": (lambda: nn.Linear(32, 24), (4, 2, 2, 2, 32)),
    "conv1d": (lambda: nn.Conv1d(16, 24, 3, padding=1), (4, 16, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 16, 3, stride=2, padding=1), (4, 3, 9, 9)),
    "conv2d, 1x1, no bias": (lambda: nn.Conv2d(16, 24, 1, bias=False), (4, 16, 5, 5)),
    "conv2d, same, even kernel": (lambda: nn.Conv2d(8, 8, 4, padding="same"), (4, 8, 6, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(16, 32, 3, groups=4), (4, 16, 7, 7)),
    "conv2d, depthwise": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=16), (4, 16, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 8, 3, padding=1), (4, 4, 5, 5, 5)),
}


@pytest.mark.parametrize("batch", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layer", LAYERS)
def test_int8_is_exact_within_the_weight_limit(backend: Backend, layer: str, batch: int) -> None:
    limit = int8_limit(backend)
    make, shape = LAYERS[layer]
    inputs = (off_the_borders(*shape),)
    graph = compressed(graph_of(seeded(make()), *inputs), "int8", limit)
    some = tuple(t[:batch] for t in inputs)
    for choice in choices(backend):
        assert_close(graph, built(backend, graph, some, choice), some, INTEGER)


def test_int8_at_the_limit_does_not_overflow(backend: Backend) -> None:
    """All weights and all activations as large as they may be."""
    limit = int8_limit(backend)
    layer = nn.Linear(256, 64)
    nn.init.constant_(layer.weight, 0.1)
    inputs = (torch.full((2, 16, 256), 127 * STEP),)
    graph = compressed(graph_of(layer, *inputs), "int8", limit)
    for choice in choices(backend):
        assert_close(graph, built(backend, graph, inputs, choice), inputs, INTEGER)


def test_int8_chain(backend: Backend, block: tuple[Graph, tuple[Tensor, ...]]) -> None:
    """Inner values may fall to either side of a border: one step of the inner grid, unmasked."""
    graph, inputs = block
    graph = compressed(graph, "int8", int8_limit(backend))
    largest_weight = 0.1 * 4  # of ``seeded``: standard deviation 0.1, four of them
    for choice in choices(backend):
        executable = built(backend, graph, inputs, choice)
        assert_close(graph, executable, inputs, STEP * largest_weight)


class Chain(nn.Module):
    """Convolutions whose results go to one grid (through ReLU and pool), to two, and to a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.d = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.a(x).relu(), 2)
        x = (self.c(self.b(x).relu()) + x).relu()
        return self.d(x.mean((2, 3)))


def test_int8_convolutions_in_a_row(backend: Backend) -> None:
    """Few values fall to the other side of a border: far less than one rounding of all."""
    inputs = (random(4, 3, 12, 12),)
    plain = graph_of(seeded(Chain()), *inputs)
    graph = compressed(plain, "int8", int8_limit(backend))
    wanted = graph.run(inputs)[0].double()
    rounding = float((plain.run(inputs)[0].double() - wanted).square().sum())
    for choice in choices(backend):
        executable = built(backend, graph, inputs, choice)
        (found,) = executable.run(named(graph, inputs)).values()
        off = float((torch.from_numpy(found).double() - wanted).square().sum())
        assert off <= 0.02 * rounding
        ops = {op.node.name for op in weighted_ops(graph.module)}
        assert ops <= set(executable.profile())


def added(plain: Graph, *, scaled: bool) -> list[SiteChange]:
    """Every addition's operands on the layers' grid, or on one with a factor a channel."""
    sites = addition_sites(plain, find_sites(plain))
    nodes = {n.name: n for n in plain.module.graph.nodes}
    found = []
    for site in sites:
        grid = Quantizer(step=STEP, low=-128, high=127)
        if scaled:
            grid = replace(grid, inverse_scale=torch.linspace(0.5, 2.0, 16), shift=0.25)
        read = [a.name for a in nodes[site.ops[0]].all_input_nodes]
        operands = {name: grid for name in read if not scaled or name == site.tensor}
        found.append(SiteChange(site=site, level="int8", operands=operands))
    return found


@pytest.mark.parametrize("layers", [True, False])
def test_int8_additions(backend: Backend, *, layers: bool) -> None:
    """Those of convolutions and pools, beside integer layers and alone."""
    inputs = (random(4, 3, 12, 12),)
    plain = graph_of(seeded(Chain()), *inputs)
    changes = added(plain, scaled=False)
    assert len(changes) == 1
    if layers:
        limit = int8_limit(backend)
        changes += [change(op, plain, "int8", limit) for op in weighted_ops(plain.module)]
    assert_rounds_alike(backend, plain, apply(plain, changes), inputs)


def assert_rounds_alike(
    backend: Backend, plain: Graph, graph: Graph, inputs: tuple[Tensor, ...]
) -> None:
    """Every build is nearer to its graph than that is to the original, by far."""
    wanted = graph.run(inputs)[0].double()
    rounding = float((plain.run(inputs)[0].double() - wanted).square().sum())
    assert rounding > 0
    for choice in choices(backend):
        (found,) = built(backend, graph, inputs, choice).run(named(graph, inputs)).values()
        off = float((torch.from_numpy(found).double() - wanted).square().sum())
        assert off <= 0.02 * rounding


class Residual(nn.Module):
    """A linear layer beside what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return (self.layer(y) + y).relu()


def test_int8_additions_with_a_factor_a_channel(backend: Backend) -> None:
    inputs = (random(4, 5, 16),)
    plain = graph_of(seeded(Residual()), *inputs)
    assert_rounds_alike(backend, plain, apply(plain, added(plain, scaled=True)), inputs)


def test_sizes_that_stay_open(backend: Backend) -> None:
    """One build for all lengths; the batch is as built."""
    inputs = (random(4, 9, 16),)
    leaf, none = Structure(kind="tensor"), Structure(kind="dict")
    call = Call(Structure(kind="tuple", children=(leaf,)), none)
    samples = Samples(call, inputs, ((random(4, 5, 16),),))
    graph = capture(seeded(Block()), samples, varying([samples])).graph
    spec = graph.signature.inputs[0]
    assert spec.symbol(1)
    for choice in choices(backend):
        executable = backend.build(graph, {spec.name: (2, OPEN, 16)}, choice)
        for length in (9, 5, 13):
            some = (random(2, length, 16, seed=length),)
            assert_close(graph, executable, some, FLOAT)
        assert {op.node.name for op in weighted_ops(graph.module)} <= set(executable.profile())
        with pytest.raises(ShapeError, match="wanted"):
            executable.run(named(graph, (random(3, 9, 16),)))


def test_one_model_at_single_sizes(backend: Backend) -> None:
    """From a build with open sizes, and from what it wrote; the sizes are then the only ones."""
    inputs = (random(4, 9, 16), random(4, 9))
    others = [(random(4, n, 16), random(4, n)) for n in (5, 13)]
    leaf, none = Structure(kind="tensor"), Structure(kind="dict")
    samples = Samples(
        Call(Structure(kind="tuple", children=(leaf, leaf)), none), inputs, tuple(others)
    )
    graph = capture(seeded(Weighted()), samples, varying([samples])).graph
    x, weights = (spec.name for spec in graph.signature.inputs)
    for choice in choices(backend):
        opened = backend.build(graph, {x: (2, OPEN, 16), weights: (2, OPEN)}, choice)
        loaded = backend.load(opened.serialize(), choice)
        for executable in (opened, loaded):
            assert isinstance(executable, Reshapable)
            for length in (5, 13):
                some = (random(2, length, 16, seed=length), random(2, length, seed=1))
                single = executable.at({x: (2, length, 16), weights: (2, length)})
                assert_close(graph, single, some, FLOAT)
                assert_close(graph, executable, some, FLOAT)  # still takes every size
                assert {op.node.name for op in weighted_ops(graph.module)} <= set(single.profile())
            with pytest.raises(ShapeError, match="for which this model was built"):
                single.run(named(graph, (random(2, 9, 16), random(2, 9))))
            with pytest.raises((ShapeError, BackendError)):
                executable.at({x: (2, 5, 16), weights: (2, 6)})


def test_weight_only_int8_is_smaller_and_equal(
    backend: Backend, mixed: tuple[Graph, tuple[Tensor, ...]]
) -> None:
    info = backend.describe().format("int8_weight")
    if info is None:
        pytest.skip("no int8_weight on this device")
    table = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 512))
    inputs = (torch.arange(12).reshape(4, 3),)
    graph = graph_of(seeded(table), *inputs)
    smaller = compressed(graph, "int8_weight", info.weight_limit)
    for choice in choices(backend):
        whole = sum(map(len, built(backend, graph, inputs, choice).serialize().values()))
        executable = built(backend, smaller, inputs, choice)
        assert_close(smaller, executable, inputs, FLOAT)
        assert sum(map(len, executable.serialize().values())) < 0.35 * whole
    graph, inputs = mixed
    graph = compressed(graph, "int8_weight", info.weight_limit)
    assert_close(graph, built(backend, graph, inputs, choices(backend)[0]), inputs, FLOAT)


def test_unsupported_op_names_it_and_the_way_out(backend: Backend) -> None:
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    inputs = (random(2, 3),)
    graph = graph_of(Bessel(), *inputs)
    if backend.describe().name in OF_TORCH:
        assert_close(graph, built(backend, graph, inputs, choices(backend)[0]), inputs, FLOAT)
        return
    with pytest.raises(BackendError, match=r"special_bessel_j0.*another backend"):
        built(backend, graph, inputs, choices(backend)[0])


def test_refuses_other_devices_and_options(
    backend: Backend, block: tuple[Graph, tuple[Tensor, ...]]
) -> None:
    graph, inputs = block
    name = backend.describe().name
    with pytest.raises((ConfigError, BackendError), match="abacus"):
        built(backend, graph, inputs, BuildChoice(backend=name, device="abacus"))
    with pytest.raises(ConfigError, match="warp"):
        built(backend, graph, inputs, BuildChoice(backend=name, options={"warp": 9}))


def test_refuses_inputs_that_do_not_fit(
    backend: Backend, block: tuple[Graph, tuple[Tensor, ...]]
) -> None:
    graph, inputs = block
    executable = built(backend, graph, inputs, choices(backend)[0])
    (name, array), *_ = named(graph, inputs).items()
    with pytest.raises(ShapeError, match=r"found shape \(1, 7, 16\), wanted \(4, 7, 16\)"):
        executable.run({name: array[:1]})
    with pytest.raises(DataError, match="found dtype float64, wanted float32"):
        executable.run({name: array.astype(np.float64)})
    with pytest.raises(DataError, match=r"found inputs \[\], wanted"):
        executable.run({})
