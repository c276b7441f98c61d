"""Random small models of Hugging Face: captured as their users have them, configs put back."""

import contextlib
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tersor.build.reference import GraphExecutable
from tersor.capture.configuration import EXPORTABLE, configured
from tersor.capture.module import Captured, capture
from tersor.capture.samples import collect, varying
from tersor.core.data import Data
from tersor.core.errors import CaptureError
from tersor.runtime.runner import Runner
from tests.conformance.zoo.torchvision_shim import import_torchvision
from tests.unit.capturing import samples, scale_error

# The same ops in the same order; experts are summed in another.
ROUNDINGS = 1e-5
VOCABULARY = 96
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
VISION = {k: v for k, v in SMALL.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
LAYERS = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and what it imports


@pytest.fixture(scope="module")
def hf() -> Any:
    pytest.importorskip("transformers")
    with contextlib.suppress(ImportError):
        import_torchvision()  # which transformers imports where it is installed
    return importlib.import_module("transformers")


def ids(length: int, seed: int = 0, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator)


def text(length: int, seed: int = 0) -> dict[str, Tensor]:
    mask = torch.ones(4, length, dtype=torch.long)
    mask[1, length - 2 :] = 0
    return {"input_ids": ids(length, seed), "attention_mask": mask}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed))


def pair(source: int, target: int) -> dict[str, Tensor]:
    return text(source) | {"decoder_input_ids": ids(target, seed=1)}


TEXTS = [text(9), text(6), text(12)]
LLAMA = SMALL | {"num_key_value_heads": 2}
Entry = tuple[Callable[[Any], nn.Module], list[dict[str, Tensor]], dict[str, Tensor]]
MODELS: dict[str, Entry] = {
    "bert": (
        lambda t: t.BertModel(t.BertConfig(**SMALL, max_position_embeddings=64)), TEXTS, text(20),
    ),
    "gpt2": (
        lambda t: t.GPT2LMHeadModel(
            t.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        ),
        TEXTS, text(20),
    ),
    "llama": (lambda t: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)), TEXTS, text(20)),
    "mistral": (
        lambda t: t.MistralForCausalLM(t.MistralConfig(**LLAMA, head_dim=8, sliding_window=4)),
        TEXTS[:1], text(9, 3),
    ),
    "mixtral": (
        lambda t: t.MixtralForCausalLM(t.MixtralConfig(**LLAMA, num_local_experts=4)),
        TEXTS, text(20),
    ),
    "t5": (
        lambda t: t.T5ForConditionalGeneration(
            t.T5Config(
                vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
            )
        ),
        [pair(9, 5), pair(12, 8)], pair(20, 11),
    ),
    "whisper": (
        lambda t: t.WhisperForConditionalGeneration(
            t.WhisperConfig(
                vocab_size=VOCABULARY, num_mel_bins=8, max_source_positions=20, pad_token_id=0,
                bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **LAYERS,
            )
        ),
        [{"input_features": noise(8, 40), "decoder_input_ids": ids(5)}],
        {"input_features": noise(8, 40, seed=5), "decoder_input_ids": ids(5, seed=6)},
    ),
    "clip": (
        lambda t: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**VISION, projection_dim=16)),
        [{"pixel_values": noise(3, 32, 32)}], {"pixel_values": noise(3, 32, 32, seed=5)},
    ),
    "vit": (
        lambda t: t.ViTForImageClassification(t.ViTConfig(**VISION)),
        [{"pixel_values": noise(3, 32, 32)}], {"pixel_values": noise(3, 32, 32, seed=5)},
    ),
    "detr": (
        lambda t: t.DetrForObjectDetection(
            t.DetrConfig(
                **LAYERS, num_queries=6, use_timm_backbone=False, use_pretrained_backbone=False,
                backbone=None,
                backbone_config=t.ResNetConfig(
                    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
                    out_features=["stage2"],
                ),
            )
        ),
        [{"pixel_values": noise(3, 32, 48)}, {"pixel_values": noise(3, 48, 32)}],
        {"pixel_values": noise(3, 40, 64, seed=5)},
    ),
}  # fmt: skip


def made(hf: Any, name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0](hf).eval()


def captured(model: nn.Module, items: list[Any]) -> Captured:
    parts = collect(Data(calibration=items, search=items, test=items), 0, ragged=True)
    return capture(model, parts["calibration"], varying(parts.values()))


def compare(found: Any, wanted: Any, limit: float) -> None:
    """Nested outputs, field by field; fields that are None are left out on both sides."""
    if isinstance(wanted, Tensor):
        assert found.dtype == wanted.dtype
        assert scale_error(found.float(), wanted.float()) <= limit
        return
    assert list(found.keys()) == list(wanted.keys())
    for key in wanted:
        compare(found[key], wanted[key], limit)


# An encoder, two decoders and a network of images are in every run.
SLOW = ("detr", "t5", "mixtral", "whisper", "gpt2", "clip")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MODELS]
)
def test_models_at_sizes_that_no_batch_had(hf: Any, name: str) -> None:
    model = made(hf, name)
    _, items, fresh = MODELS[name]
    settings = [(c, n, getattr(c, n)) for c in configs(model) for n in EXPORTABLE if hasattr(c, n)]
    found = captured(model, items)
    assert all(getattr(c, n) == value for c, n, value in settings)
    run = Runner(GraphExecutable(found.graph), found.graph.signature, 3)
    answer = run(**fresh)
    wanted = found.original(**fresh)
    assert answer._type_name == type(wanted).__name__ == found.graph.signature.result.type_name
    compare(answer, wanted, ROUNDINGS)
    assert getattr(answer, "past_key_values", None) is None


def configs(model: nn.Module) -> list[Any]:
    found = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return list(found.values())


def test_experts_are_one_product_while_captured(hf: Any) -> None:
    model = made(hf, "mixtral")
    assert model.config._experts_implementation != "batched_mm"
    found = captured(model, MODELS["mixtral"][1][:1])
    assert not [n for n in found.graph.module.graph.nodes if "grouped_mm" in str(n.target)]


def test_a_cache_that_is_asked_for_is_named(hf: Any) -> None:
    model = made(hf, "llama")
    with pytest.raises(CaptureError, match=r"found DynamicCache.*use_cache=False"):
        capture(model, samples(text(6) | {"use_cache": True}))
    assert model.config.use_cache is True


def test_half_precision(hf: Any) -> None:
    model = made(hf, "bert").bfloat16()
    found = captured(model, TEXTS[:1])
    run = Runner(GraphExecutable(found.graph), found.graph.signature, 3)
    fresh = text(9, 3)
    # Two layers in bfloat16 against float32: tens of roundings of 2**-9.
    compare(run(**fresh), found.original(**fresh), 0.1)


# --- configs, without the library


def nested() -> nn.Module:
    text_config = SimpleNamespace(use_cache=True)
    shared = SimpleNamespace(use_cache=True, text_config=text_config, other=3)
    text_config.parent = shared  # a circle
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.config = shared
    model[0].config = SimpleNamespace(use_cache=None, _experts_implementation="eager")
    model[1].config = {"use_cache": True}  # a dict is no config
    return model


def values(model: nn.Module) -> list[Any]:
    return [
        model.config.use_cache,
        model.config.text_config.use_cache,
        model[0].config.use_cache,
        model[0].config._experts_implementation,
    ]


def test_all_configs_are_set_and_put_back() -> None:
    model = nested()
    before = values(model)
    with configured(model, EXPORTABLE):
        assert values(model) == [False, False, False, "batched_mm"]
        assert not hasattr(model.config, "_experts_implementation")
        assert model[1].config == {"use_cache": True}
    assert values(model) == before == [True, True, None, "eager"]


def test_configs_are_put_back_after_an_error() -> None:
    model = nested()
    model.forward = lambda x: x if x.sum() > 0 else -x  # type: ignore[method-assign]
    before = values(model)
    with pytest.raises(CaptureError):
        capture(model.eval(), samples(torch.ones(3, 2)))
    assert values(model) == before
    with pytest.raises(ZeroDivisionError), configured(model, EXPORTABLE):
        raise ZeroDivisionError
    assert values(model) == before
