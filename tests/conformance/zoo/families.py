"""The fast tier: one small network for each family, in plain torch."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from tests.conformance.zoo import families_attention as attention
from tests.conformance.zoo import families_cnn as cnn
from tests.conformance.zoo.entry import BATCH, ZooModel, built, floats, picture, tokens

Inputs = Callable[[], tuple[Any, ...] | dict[str, Any]]
PICTURE = picture(32)


def _text(length: int = 12) -> tuple[Any, ...]:
    return (tokens(length, attention.VOCABULARY),)


def _masked_text() -> tuple[Any, ...]:
    mask = torch.ones(BATCH, 12, dtype=torch.int64)
    mask[1, -3:] = 0
    return (*_text(), mask)


def _two_texts() -> tuple[Any, ...]:
    return (*_text(), tokens(9, attention.VOCABULARY, seed=1))


CNNS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "residual": (cnn.residual, PICTURE),
    "grouped": (cnn.grouped, PICTURE),
    "dense": (cnn.dense, PICTURE),
    "shuffle": (cnn.shuffle, PICTURE),
    "mobile": (cnn.mobile, PICTURE),
    "modern": (cnn.modern, PICTURE),
    "unet": (cnn.UNet, PICTURE),
    "volume": (cnn.Volume, lambda: (floats(1, 8, 12, 10),)),
    "group_norm": (cnn.GroupNormed, PICTURE),
    "sound": (cnn.Sound, lambda: (floats(400),)),
}
TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "vit_multihead": (attention.vit_multihead, PICTURE),
    "vit_fused": (attention.vit_fused, PICTURE),
    "windows": (attention.Windows, PICTURE),
    "bert": (attention.Bert, _masked_text),
    "gpt": (attention.GPT, _text),
    "llama": (attention.llama, _text),
    "experts": (attention.experts, _text),
    "mixer": (attention.Mixer, PICTURE),
    "translator": (attention.Translator, _two_texts),
}


def entries() -> Iterator[ZooModel]:
    """One entry a family."""
    for kind, table in (("cnn", CNNS), ("transformer", TRANSFORMERS)):
        for name, (make, inputs) in table.items():
            yield ZooModel(
                name=f"families/{name}",
                family=name,
                source="families",
                kind=kind,
                build=built(make, inputs),
                inputs=inputs,
            )
