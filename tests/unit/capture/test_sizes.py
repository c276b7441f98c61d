"""Dimensions beyond the batch: exported as dynamic, named, bounded by what the graph can take."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tersor.build.export import exported_program
from tersor.build.reference import GraphExecutable
from tersor.capture.module import Captured, capture
from tersor.capture.samples import collect, varying
from tersor.core.data import Data
from tersor.core.errors import CaptureError, DataError
from tersor.graph.shapes import LARGEST
from tersor.runtime.runner import Runner
from tests.unit.capturing import random, samples, scale_error, trained

ROUNDINGS = 1e-5


def captured(model: nn.Module, items: list[Any]) -> Captured:
    parts = collect(Data(calibration=items, search=items, test=items), 0, ragged=True)
    return capture(trained(model), parts["calibration"], varying(parts.values()))


def runner(found: Captured) -> Runner:
    return Runner(GraphExecutable(found.graph), found.graph.signature, 2)


class Text(nn.Module):
    """Embeddings, learned positions, attention; a pooled and a sequence output."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 8), nn.Embedding(64, 8)
        self.register_buffer("ids", torch.arange(64)[None])
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.words(input_ids) + self.places(self.ids[:, : input_ids.shape[1]])
        mask = attention_mask[:, None, None].bool()
        q, k, v = (m(x).unflatten(-1, (2, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return y, y.mean(1)


def text(length: int, count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (count, length), generator=generator)
    mask = torch.ones(count, length, dtype=torch.long)
    mask[1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_the_length_of_text() -> None:
    model = Text()
    found = captured(model, [text(9), text(5), text(12)])
    ids, mask = found.graph.signature.inputs
    assert ids.shape == mask.shape == (None, 12)  # the largest; where builds are made
    assert ids.dynamic == mask.dynamic == ("", "length_1")
    assert ids.limits == mask.limits == ((0, 0, 0), (2, 64, 1))
    whole, pooled = found.graph.signature.outputs
    assert (whole.shape, whole.dynamic) == ((None, 12, 8), ("", "length_1", ""))
    assert (pooled.shape, pooled.dynamic) == ((None, 8), ())
    run = runner(found)
    for length in (2, 7, 33, 64):
        item = text(length, 3, seed=length)
        with torch.no_grad():
            for one, other in zip(run(**item), model(**item), strict=True):
                assert scale_error(one, other) <= ROUNDINGS
    assert run(**text(7, 2))[0].shape == (2, 7, 8)


def test_an_empty_batch_of_another_length() -> None:
    found = captured(Text(), [text(9), text(5)])
    empty = {k: v[:0] for k, v in text(7).items()}
    whole, pooled = runner(found)(**empty)
    assert whole.shape == (0, 7, 8)
    assert pooled.shape == (0, 8)


@pytest.mark.parametrize("length", [1, 65])
def test_a_length_that_the_graph_can_not_take_is_refused(length: int) -> None:
    run = runner(captured(Text(), [text(9), text(5)]))
    with pytest.raises(DataError) as caught:
        run(**text(length))
    message = str(caught.value)
    assert "dimension 1 of input 'input_ids' (length_1)" in message
    assert f"found size {length}, wanted 2 to 64; pad or crop" in message


def test_lengths_that_were_always_equal_must_stay_equal() -> None:
    class Pair(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a.mean(1) + b.mean(1)

    found = captured(Pair(), [(random(4, n), random(4, n)) for n in (5, 9)])
    run = runner(found)
    assert run(random(3, 7), random(3, 7)).shape == (3,)
    with pytest.raises(DataError, match=r"dimension 1 of input 'b': found size 8, but .*'a' has 7"):
        run(random(3, 7), random(3, 8))
    free = captured(Pair(), [(random(4, n), random(4, m)) for n, m in ((5, 6), (9, 6), (9, 3))])
    assert [s.dynamic for s in free.graph.signature.inputs] == [("", "length_1"), ("", "length_2")]
    assert runner(free)(random(3, 7), random(3, 8)).shape == (3,)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = F.interpolate(self.b(F.max_pool2d(y, 4)), scale_factor=4.0)
        return torch.cat([y, z], 1)


def test_height_and_width() -> None:
    model = UNet()
    found = captured(model, [random(3, 1, 16, 24), random(3, 1, 24, 16), random(3, 1, 32, 16)])
    (spec,) = found.graph.signature.inputs
    assert spec.shape == (None, 1, 32, 16)
    assert spec.dynamic == ("", "", "height_1", "width_1")
    assert [step for _, _, step in spec.limits] == [0, 0, 4, 4]
    assert found.graph.signature.outputs[0].dynamic == ("", "", "height_1", "width_1")
    run = runner(found)
    for size in ((16, 16), (40, 24), (64, 96)):
        x = random(3, 1, *size)
        with torch.no_grad():
            assert scale_error(run(x), model(x)) <= ROUNDINGS
    with pytest.raises(DataError, match=r"\(width_1\): found size 18, .* in steps of 4; pad"):
        run(random(3, 1, 16, 18))


def test_outputs_of_another_size_are_expressions() -> None:
    found = captured(nn.Conv1d(2, 3, 3, stride=2), [random(3, 2, 9), random(3, 2, 14)])
    (output,) = found.graph.signature.outputs
    assert output.shape == (None, 3, 6)
    assert "length_1" in output.dynamic[2]
    assert output.dynamic[2] != "length_1"
    assert runner(found)(random(3, 2, 21)).shape == (3, 3, 10)


class Branches(nn.Module):
    """Another computation above a length: the graph holds one of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] > 20 else x * 3


def test_a_branch_on_a_size_bounds_it() -> None:
    found = captured(Branches(), [random(3, 22), random(3, 30)])
    assert found.graph.signature.inputs[0].limits == ((0, 0, 0), (21, LARGEST, 1))
    with pytest.raises(DataError, match="found size 20, wanted at least 21; pad"):
        runner(found)(random(3, 20))


class OddOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1)) if x.shape[1] % 2 else x + 1
        return x.mean(1)


def test_a_branch_on_parity_is_a_step() -> None:
    found = captured(OddOnly(), [random(3, 11), random(3, 15)])
    assert found.graph.signature.inputs[0].limits[1][2] == 2
    with pytest.raises(DataError, match="in steps of 2"):
        runner(found)(random(3, 12))


def test_sizes_that_take_different_branches_are_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        captured(Branches(), [random(3, 10), random(3, 30)])
    message = str(caught.value)
    assert "dimension 1 of input 'x' (length_1): found size 10, wanted at least 21" in message
    assert "Branches computes otherwise at other sizes" in message
    assert "or pad all inputs to one size" in message


class Tabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterDict({"12": torch.ones(12), "8": torch.ones(8)})

    def forward(self, x: Tensor) -> Tensor:
        return x * self.tables[str(int(x.shape[1]))]


def test_a_size_that_the_code_fixes_is_named() -> None:
    with pytest.raises(CaptureError) as caught:
        captured(Tabled(), [random(3, 12), random(3, 8)])
    message = str(caught.value)
    assert "dimension 1 of input 0 (x) varies in the data" in message
    assert "fixes it to 12" in message
    assert "tersor.Data(..., to_inputs=...)" in message


def test_sizes_that_the_model_itself_refuses_are_the_datas() -> None:
    with pytest.raises(DataError) as caught:
        captured(nn.Linear(28, 4), [random(3, 28), random(3, 27)])
    message = str(caught.value)
    assert "input 0 comes in 2 shapes a sample, such as [(27,), (28,)]" in message
    assert "pad or crop" in message
    assert "the model failed on float32(2, 27)" in message


def test_dimensions_may_be_asked_for() -> None:
    found = capture(trained(Text()), samples(text(9)), {(0, 1), (1, 1)})
    assert found.graph.signature.inputs[0].dynamic == ("", "length_1")
    item = text(14, 3)
    assert runner(found)(**item)[0].shape == (3, 14, 8)
    fixed = capture(trained(Text()), samples(text(9)))
    assert fixed.graph.signature.inputs[0].dynamic == ()
    with pytest.raises(DataError, match=r"found shape \(3, 14\), wanted \(batch, 9\)"):
        runner(fixed)(**item)


def test_a_size_beyond_what_torch_bounds_is_refused_when_it_runs() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Embedding(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.places(torch.arange(x.shape[1]))

    found = captured(Positions(), [random(3, 5, 4), random(3, 9, 4)])
    run = runner(found)
    assert run(random(3, 16, 4)).shape == (3, 16, 4)
    with pytest.raises(DataError, match=r"can't run at \{'length_1': 17\} .*captured at .* 9"):
        run(random(3, 17, 4))


def test_the_graph_is_exported_again_with_open_sizes() -> None:
    found = captured(Text(), [text(9), text(5)])
    again = exported_program(found.graph).module()
    item = text(7, 3)
    whole, _ = again(item["input_ids"], item["attention_mask"])
    assert whole.shape == (3, 7, 8)
