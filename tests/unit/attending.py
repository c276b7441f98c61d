"""Small attention layers of several makes, for tests of what may be done to their heads."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Queries, keys and values by three projections, and one behind; then a layer that bends.

    Args:
        sharing: Query heads of one key and value head.
        how: ``sdpa``, ``products`` (two matrix products and a softmax) or ``fused`` (one projection).
        heads, size, inputs: Query heads, dimensions of each, and of what is read.
        between: What happens to a head's part: ``nothing``, ``rotary`` (queries and keys), ``relu`` or
            ``norm`` (values).
    """

    def __init__(
        self,
        sharing: int = 1,
        how: str = "sdpa",
        between: str = "nothing",
        *,
        heads: int = 4,
        size: int = 6,
        inputs: int = 10,
    ) -> None:
        super().__init__()
        self.heads, self.size, self.sharing = heads, size, sharing
        self.how, self.between = how, between
        width, few = self.heads * self.size, self.heads * self.size // sharing
        if how == "fused":
            self.qkv = nn.Linear(inputs, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(inputs, n) for n in (width, few, few))
        self.o, self.up = nn.Linear(width, inputs), nn.Linear(inputs, 12)
        self.down = nn.Linear(12, inputs)
        self.register_buffer("turn", torch.linspace(0.5, 1.5, self.size))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, t, _ = x.shape
        if self.how == "fused":
            qkv = self.qkv(x).reshape(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
            return qkv[0], qkv[1], qkv[2]

        def split(y: Tensor) -> Tensor:
            return y.reshape(b, t, -1, self.size).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
        if self.sharing > 1:
            k, v = (y.repeat_interleave(self.sharing, 1) for y in (k, v))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        if self.between == "rotary":
            q, k = q * self.turn, k * self.turn
        elif self.between == "relu":
            v = v.relu()
        elif self.between == "norm":
            v = functional.normalize(v, dim=-1)
        if self.how == "products":
            scores = (q @ k.transpose(-1, -2)) / self.size**0.5
            found = scores.softmax(-1) @ v
        else:
            found = functional.scaled_dot_product_attention(q, k, v)
        z = self.o(found.transpose(1, 2).flatten(2))
        out: Tensor = self.down(self.up(x + z).relu())
        return out
