"""A small transformer language model, trained on English text that every Python ships.

Text are the docstrings of the standard library, a token a piece of a byte-pair vocabulary that is
trained on them too. Modules are split by hash: no module is in two parts.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from tersor.cli.demo.sentences import part_of, standard_library

FOLDER = Path(__file__).parents[2] / "out" / "solvers"
VOCABULARY, CONTEXT, WIDTH, DEPTH, HEADS = 2048, 128, 192, 4, 6
STEPS, BATCH, RATE = 1200, 16, 2e-3


class Attention(nn.Module):
    """Causal self-attention with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, d] -> [b, t, d]."""
        b, t, d = x.shape
        q, k, v = (
            layer(x).reshape(b, t, HEADS, d // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(y.transpose(1, 2).reshape(b, t, d))
        return result


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[b, t, d] -> [b, t, d]."""
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return result


class LanguageModel(nn.Module):
    """Token ids [b, CONTEXT] -> logits [b, CONTEXT, VOCABULARY]; 2.6 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.head(self.norm(self.layers(self.tokens(ids) + self.places)))
        return logits


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids in windows of CONTEXT + 1 [windows, CONTEXT + 1]."""

    train: Tensor
    test: Tensor


@lru_cache(maxsize=1)
def corpus() -> Corpus:
    """Train modules are those of the calibration and search part of ``sentences``, test the others."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    parts: dict[bool, list[str]] = {True: [], False: []}
    for sentence, module in standard_library().items():
        # The larger share of the modules is for training: the small model needs the text.
        parts[part_of(module, seed=3) == "search"].append(sentence)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(parts[False], trainer)

    def windows(lines: list[str]) -> Tensor:
        ids = torch.tensor(tokenizer.encode("\n".join(lines)).ids)
        count = len(ids) // (CONTEXT + 1)
        return ids[: count * (CONTEXT + 1)].reshape(count, CONTEXT + 1)

    return Corpus(windows(parts[False]), windows(parts[True]))


def perplexity(predict: object, windows: Tensor, batch: int = 32) -> float:
    """exp of the mean cross-entropy of the next token."""
    assert callable(predict)
    total = 0.0
    with torch.no_grad():
        for part in windows.split(batch):
            logits = predict(part[:, :-1])
            loss = functional.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
            )
            total += float(loss)
    return math.exp(total / windows[:, 1:].numel())


def language_model() -> LanguageModel:
    """The trained model; trained once (some ten minutes on one core), then read from ``out``."""
    path, model = FOLDER / "lm.safetensors", LanguageModel()
    if not path.is_file():
        trained = train()
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(trained.state_dict(), path)
    model.load_state_dict(load_file(path))
    return model.eval()


def train(steps: int = STEPS) -> LanguageModel:
    """AdamW with one cycle, on windows drawn by a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(0)
        model = LanguageModel()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ("tokens" in name or "places" in name):
            nn.init.normal_(parameter, std=0.02, generator=generator)
    windows = corpus().train
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=steps, pct_start=0.1
    )
    for step in range(steps):
        part = windows[torch.randint(len(windows), (BATCH,), generator=generator)]
        logits = model(part[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"language model: step {step} of {steps}, loss {float(loss.detach()):.3f}",
                flush=True,
            )
    return model.eval()
