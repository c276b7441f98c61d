"""Hugging Face architectures from small random configurations; nothing is downloaded.

Widths are small but no two that mean different things are equal, so that a rule that mixes them
up is seen: heads times head size is the width only where the architecture says so.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from tests.conformance.zoo.entry import BATCH, ZooModel, built, floats, tokens
from tests.conformance.zoo.torchvision_shim import import_torchvision

VOCABULARY = 101
LENGTH = 12
SIZE = 64
SAMPLES = 1600  # of sound: 0.1 s at 16 kHz
FRAMES = 32  # of a Mel spectrogram

# 0.02, the usual one, makes branches so weak in a narrow network that they hardly matter.
SPREAD = 0.15
COMMON = {
    "initializer_range": SPREAD,
    "init_std": SPREAD,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "decoder_start_token_id": 1,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
}
DECODER = {
    **ENCODER,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "use_cache": False,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "image_size": SIZE,
    "patch_size": 16,
}
CROSS = {
    "vocab_size": VOCABULARY,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 88,
    "d_model": 48,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# name: (class, its configuration's class, fields, inputs)
MODELS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER, "text"),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", ENCODER, "text"),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80},
        "text",
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {
            **ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
        "text",
    ),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", ENCODER, "text"),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", ENCODER, "text"),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 48,
            "d_kv": 8,
            "d_ff": 80,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "use_cache": False,
        },
        "text to text",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 40,
            "use_cache": False,
        },
        "text",
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, "text"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER, "text"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER, "text"),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", DECODER | {"tie_word_embeddings": True}, "text"),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER | {"sliding_window": 8}, "text"),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", DECODER | EXPERTS, "text"),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **CROSS,
            "num_mel_bins": 20,
            "max_source_positions": FRAMES // 2,
            "max_target_positions": 40,
            "use_cache": False,
        },
        "speech to text",
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            **{k: v for k, v in ENCODER.items() if k != "max_position_embeddings"},
            "conv_dim": [24, 32, 40],
            "conv_kernel": [10, 3, 2],
            "conv_stride": [5, 2, 2],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        "sound",
    ),
    "clip": ("CLIPModel", "CLIPConfig", {}, "text and picture"),
    "siglip": ("SiglipModel", "SiglipConfig", {}, "text and picture"),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION, "picture"),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": SIZE,
            "embed_dim": 24,
            "depths": [2, 2],
            "num_heads": [2, 4],
            "window_size": 4,
        },
        "picture",
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [16, 32, 40, 64],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 2, 5, 8],
            "decoder_hidden_size": 48,
        },
        "picture",
    ),
    "detr": ("DetrForObjectDetection", "DetrConfig", CROSS | {"num_queries": 7}, "masked picture"),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 24, 40, 48], "depths": [1, 1, 2, 1]},
        "picture",
    ),
}
CNNS = ("convnext",)


def entries() -> Iterator[ZooModel]:
    """One entry an architecture."""
    for name, (_, _, _, kind) in MODELS.items():
        yield ZooModel(
            name=f"transformers/{name}",
            family=name,
            source="transformers",
            kind="cnn" if name in CNNS else "transformer",
            build=built(partial(_make, name), INPUTS[kind]),
            inputs=INPUTS[kind],
        )


def _make(name: str) -> nn.Module:
    if find_spec("torchvision"):
        import_torchvision()  # what transformers imports has to import
    import transformers

    model, config, fields, _ = MODELS[name]
    made = getattr(transformers, config)(**(COMMON | fields | _nested(name)))
    made._experts_implementation = "batched_mm"
    network: nn.Module = getattr(transformers, model)(made)
    return network


def _nested(name: str) -> dict[str, Any]:
    """Configurations inside configurations."""
    import transformers

    if name in {"clip", "siglip"}:
        fields: dict[str, Any] = {"text_config": ENCODER | {"eos_token_id": 2}} | {
            "vision_config": VISION | {"hidden_size": 56}
        }
        if name == "clip":
            fields["projection_dim"] = 32
        else:
            fields = {
                "text_config": ENCODER | {"hidden_size": 56, "projection_size": 56},
                "vision_config": VISION | {"hidden_size": 56},
            }
        return fields
    if name == "detr":
        backbone = transformers.ResNetConfig(
            embedding_size=16,
            hidden_sizes=[24, 32, 40, 48],
            depths=[1, 1, 1, 1],
            out_features=["stage4"],
        )
        return {"use_timm_backbone": False, "use_pretrained_backbone": False} | {
            "backbone": None,
            "backbone_config": backbone,
        }
    return {}


def _mask() -> Tensor:
    """The last two tokens of the second sample are padding."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, -2:] = 0
    return mask


def _text() -> dict[str, Any]:
    return {"input_ids": tokens(LENGTH, VOCABULARY), "attention_mask": _mask()}


def _pictures() -> dict[str, Any]:
    return {"pixel_values": floats(3, SIZE, SIZE)}


INPUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "text": _text,
    "text to text": lambda: _text() | {"decoder_input_ids": tokens(8, VOCABULARY, seed=1)},
    "speech to text": lambda: {
        "input_features": floats(20, FRAMES),
        "decoder_input_ids": tokens(8, VOCABULARY, seed=1),
    },
    "sound": lambda: {"input_values": floats(SAMPLES)},
    "text and picture": lambda: _text() | _pictures(),
    "picture": _pictures,
    "masked picture": lambda: (
        _pictures() | {"pixel_mask": torch.ones(BATCH, SIZE, SIZE, dtype=torch.int64)}
    ),
}
