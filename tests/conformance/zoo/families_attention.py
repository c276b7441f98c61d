"""Transformer families, two layers deep; no two widths that differ in meaning are equal.

Pictures are [b, 3, SIZE, SIZE], texts are token numbers [b, length].
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 7
SIZE = 32
VOCABULARY = 53
WIDTH = 24  # of the residual stream
HEADS = 4
HIDDEN = 40
LENGTH = 16  # of a text, at most


class MLP(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        y: Tensor = self.down(functional.gelu(self.up(x)))
        return y


class FusedAttention(nn.Module):
    """One product gives queries, keys and values."""

    def __init__(self, width: int = WIDTH, size: int = 5) -> None:
        super().__init__()
        self.num_heads, self.size = HEADS, size  # heads times size is not the width
        self.qkv = nn.Linear(width, 3 * HEADS * size)
        self.out = nn.Linear(HEADS * size, width)

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, width] -> the same."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(b, n, HEADS * self.size))
        return mixed


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and with a shortcut."""

    def __init__(self, attention: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, width] -> the same."""
        x = x + self.attention(self.norm(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(nn.Module):
    """Patches, a class token and positions. Source: Dosovitskiy et al. 2020."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, SIZE, SIZE] -> [b, CLASSES]."""
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(y))[:, 0])
        return logits


def vit_fused() -> nn.Module:
    """One linear layer for queries, keys and values."""
    return ViT(Block(FusedAttention()), Block(FusedAttention()))


def vit_multihead() -> nn.Module:
    """torch's own encoder layers, around ``nn.MultiheadAttention``."""

    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(
            WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=True
        )

    return ViT(layer(), layer())


class WindowAttention(nn.Module):
    """Attention inside windows of 4 x 4, shifted or not, with a table of relative positions.

    Source: Liu et al. 2021, Swin.
    """

    index: Tensor

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.num_heads, self.shift, self.side, self.size = HEADS, shift, 4, 6
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * self.size)
        self.out = nn.Linear(HEADS * self.size, WIDTH)
        self.table = nn.Parameter(torch.randn(49, HEADS))
        place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
        apart = (place.flatten(1)[:, :, None] - place.flatten(1)[:, None, :]) + 3
        self.register_buffer("index", apart[0] * 7 + apart[1])

    def forward(self, x: Tensor) -> Tensor:
        """[b, 64, WIDTH], a grid of 8 x 8 -> the same."""
        b, side = x.shape[0], self.side
        y = torch.roll(x.view(b, 8, 8, WIDTH), (-self.shift, -self.shift), (1, 2))
        y = y.view(b, 2, side, 2, side, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, WIDTH)
        qkv = self.qkv(y).reshape(-1, 16, 3, HEADS, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.size**-0.5, qkv[1], qkv[2]
        bias = self.table[self.index.view(-1)].view(16, 16, HEADS).permute(2, 0, 1)
        weight = (q @ k.transpose(-2, -1) + bias.unsqueeze(0)).softmax(-1)
        y = self.out((weight @ v).transpose(1, 2).reshape(-1, 16, HEADS * self.size))
        y = y.view(b, 2, 2, side, side, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(b, 8, 8, WIDTH)
        return torch.roll(y, (self.shift, self.shift), (1, 2)).reshape(b, 64, WIDTH)


class Windows(nn.Module):
    """Two windowed blocks and a patch merging."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(Block(WindowAttention(0)), Block(WindowAttention(2)))
        self.norm = nn.LayerNorm(4 * WIDTH)
        self.merge = nn.Linear(4 * WIDTH, 30, bias=False)
        self.head = nn.Linear(30, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, SIZE, SIZE] -> [b, CLASSES]."""
        y = self.blocks(self.patches(x).flatten(2).transpose(1, 2)).view(-1, 8, 8, WIDTH)
        corners = [y[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        logits: Tensor = self.head(self.merge(self.norm(torch.cat(corners, -1))).mean((1, 2)))
        return logits


class MaskedAttention(nn.Module):
    """Separate queries, keys and values, a softmax by hand under an additive mask."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[b, n, WIDTH] and [b, 1, 1, n] -> [b, n, WIDTH]."""
        b, n, _ = x.shape
        size = WIDTH // HEADS
        q, k, v = (
            layer(x).view(b, n, HEADS, size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weight = torch.matmul(q, k.transpose(2, 3)) / size**0.5 + mask
        y = torch.matmul(functional.softmax(weight, -1), v).transpose(1, 2).contiguous()
        mixed: Tensor = self.out(y.view(b, n, WIDTH))
        return mixed


class Bert(nn.Module):
    """Norms behind the sums, three embeddings, a pooler. Source: Devlin et al. 2018."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.kinds = nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.ModuleList(MaskedAttention() for _ in range(2))
        self.mlp = nn.ModuleList(MLP() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(4))
        self.pool = nn.Linear(WIDTH, 18)
        self.head = nn.Linear(18, CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Tokens [b, n] and mask [b, n] of 0 and 1 -> logits [b, CLASSES], states [b, n, WIDTH]."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.words(tokens) + self.positions(place) + self.kinds(torch.zeros_like(tokens))
        x = self.norm(x)
        bias = (1.0 - mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for i in range(2):
            x = self.norms[2 * i](x + self.attention[i](x, bias))
            x = self.norms[2 * i + 1](x + self.mlp[i](x))
        return {"logits": self.head(torch.tanh(self.pool(x[:, 0])))}


class CausalAttention(nn.Module):
    """One product, split in three; a triangle masks the future."""

    past: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("past", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, WIDTH] -> the same."""
        b, n, _ = x.shape
        size = WIDTH // HEADS
        q, k, v = self.qkv(x).split(WIDTH, 2)
        q, k, v = (t.view(b, n, HEADS, size).permute(0, 2, 1, 3) for t in (q, k, v))
        weight = (q @ k.transpose(-1, -2)) * size**-0.5
        weight = weight.masked_fill(~self.past[:n, :n], float("-inf")).softmax(-1)
        y: Tensor = self.out((weight @ v).permute(0, 2, 1, 3).reshape(b, n, WIDTH))
        return y


class GPT(nn.Module):
    """The embedding is the last layer, too. Source: Radford et al. 2019."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(CausalAttention()), Block(CausalAttention()))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, n] -> logits [b, n, VOCABULARY]."""
        x = self.words(tokens) + self.positions(torch.arange(tokens.shape[1]))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class RMSNorm(nn.Module):
    """x / rms(x) * weight, in plain ops. Source: Zhang and Sennrich 2019."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + size / 2) by an angle a position. Source: Su et al. 2021, RoFormer."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class GroupedAttention(nn.Module):
    """Four queries' heads share two of keys and values; positions by rotation."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.size, self.groups = size, 2
        self.query = nn.Linear(WIDTH, HEADS * size, bias=False)
        self.key = nn.Linear(WIDTH, self.groups * size, bias=False)
        self.value = nn.Linear(WIDTH, self.groups * size, bias=False)
        self.out = nn.Linear(HEADS * size, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, WIDTH] -> the same."""
        b, n, _ = x.shape
        rate = 100.0 ** (-torch.arange(self.size // 2) * 2 / self.size)
        angle = torch.arange(n)[:, None] * torch.cat([rate, rate])[None, :]
        q = rotate(self._heads(self.query(x), HEADS), angle.cos(), angle.sin())
        k = rotate(self._heads(self.key(x), self.groups), angle.cos(), angle.sin())
        v = self._heads(self.value(x), self.groups)
        k, v = (self._repeated(t) for t in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.out(y.transpose(1, 2).reshape(b, n, HEADS * self.size))
        return mixed

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, self.size).transpose(1, 2)

    def _repeated(self, x: Tensor) -> Tensor:
        """[b, groups, n, size] -> [b, HEADS, n, size]."""
        b, _, n, _ = x.shape
        more = x[:, :, None].expand(b, self.groups, HEADS // self.groups, n, self.size)
        return more.reshape(b, HEADS, n, self.size)


class Gated(nn.Module):
    """silu(gate) * up, then down. Source: Shazeer 2020, SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., WIDTH] -> the same."""
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


class Experts(nn.Module):
    """Every token goes to the best two of four gated networks, by batched products.

    Source: Shazeer et al. 2017; weights [experts, out, inp] as in Mixtral.
    """

    def __init__(self, experts: int = 4, hidden: int = 20) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.up = nn.Parameter(0.2 * torch.randn(experts, 2 * hidden, WIDTH))
        self.down = nn.Parameter(0.2 * torch.randn(experts, WIDTH, hidden))

    def forward(self, x: Tensor) -> Tensor:
        """[b, n, WIDTH] -> the same."""
        rows = x.reshape(-1, WIDTH)
        share, chosen = functional.softmax(self.router(rows), -1).topk(2, -1)
        share = share / share.sum(-1, keepdim=True)
        tokens = rows.repeat_interleave(2, 0).unsqueeze(-1)
        gate, up = torch.bmm(self.up[chosen.reshape(-1)], tokens).squeeze(-1).chunk(2, -1)
        hidden = (functional.silu(gate) * up).unsqueeze(-1)
        found = torch.bmm(self.down[chosen.reshape(-1)], hidden).squeeze(-1)
        mixed = (found * share.reshape(-1, 1)).view(-1, 2, WIDTH).sum(1)
        return mixed.view(x.shape)


class Llama(nn.Module):
    """Grouped queries, rotary positions, RMS norms and gated networks. Touvron et al. 2023."""

    def __init__(self, *networks: nn.Module) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = nn.ModuleList(GroupedAttention() for _ in networks)
        self.networks = nn.ModuleList(networks)
        self.norms = nn.ModuleList(RMSNorm(WIDTH) for _ in range(2 * len(networks) + 1))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, n] -> logits [b, n, VOCABULARY]."""
        x = self.words(tokens)
        for i, (attention, network) in enumerate(zip(self.attention, self.networks, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + network(self.norms[2 * i + 1](x))
        logits: Tensor = self.head(self.norms[-1](x))
        return logits


def llama() -> nn.Module:
    """Two layers with gated networks."""
    return Llama(Gated(), Gated())


def experts() -> nn.Module:
    """One layer with a gated network, one with experts."""
    return Llama(Gated(), Experts())


class Mixer(nn.Module):
    """MLPs over tokens and over channels in turn. Source: Tolstikhin et al. 2021."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens, self.channels = MLP(16, 28), MLP()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 3, SIZE, SIZE] -> [b, CLASSES]."""
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = y + self.tokens(self.norm(y).transpose(1, 2)).transpose(1, 2)
        y = y + self.channels(self.norm2(y))
        logits: Tensor = self.head(y.mean(1))
        return logits


class Translator(nn.Module):
    """torch's encoder and decoder, with attention across. Source: Vaswani et al. 2017."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.reader = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, batch_first=True)
        self.writer = nn.TransformerDecoderLayer(WIDTH, HEADS, 44, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 31)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """[b, n] and [b, m] -> logits [b, m, 31] and the mean of what was read [b, WIDTH]."""
        read = self.reader(self.words(source))
        written = self.writer(self.words(target), read)
        return self.head(written), read.mean(1)
