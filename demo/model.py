"""A small GPT on bytes, whose attention is `flash_attention_n`."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm

from attn_n import flash_attention_n


class GPT(nn.Module):
    """A pre-norm transformer with rotary positions; every row of its attention has n in the denominator.

    n is a number; None learns the logarithm of it for each head, from n = 1 on (sinks).
    """

    def __init__(self, n: float | None, layers: int = 4, heads: int = 4, width: int = 128) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(n, heads, width) for _ in range(layers))
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens `(B, L)` to logits `(B, L, 256)` and the lse of every attention `(layers, B, heads, L)`."""
        angles = rotary_angles(tokens.shape[1], self.head_dim)
        x = self.embedding(tokens)
        lses = []
        for block in self.blocks:
            x, lse = block(x, angles)
            lses.append(lse)
        return self.head(normalize(x)), torch.stack(lses)


class Block(nn.Module):
    def __init__(self, n: float | None, heads: int, width: int) -> None:
        super().__init__()
        self.attention = Attention(n, heads, width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Map x `(B, L, width)` to the same shape, and return lse `(B, heads, L)` too."""
        attended, lse = self.attention(normalize(x), angles)
        x = x + attended
        return x + self.down(gelu(self.up(normalize(x)))), lse


class Attention(nn.Module):
    def __init__(self, n: float | None, heads: int, width: int) -> None:
        super().__init__()
        self.n = n
        self.sinks = nn.Parameter(torch.zeros(heads)) if n is None else None
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """Map x `(B, L, width)` to the same shape, and return lse `(B, heads, L)` too."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, L, head_dim)
        q, k = rotate(q, angles), rotate(k, angles)
        out, lse = flash_attention_n(q, k, v, causal=True, sm_n=self.n, sinks=self.sinks, return_lse=True)
        return self.out(out.transpose(1, 2).flatten(2)), lse


def share_to_nothing(lse: Tensor, n: float) -> Tensor:
    """Return `n / (n + sum_j exp(s_ij))`, the weight that a row gives to no key, for an lse of any shape.

    The lse of `flash_attention_n` has n in it: it is the logarithm of this denominator.
    """
    return n * torch.exp(-lse)


def normalize(x: Tensor) -> Tensor:
    return rms_norm(x, x.shape[-1:])


def rotary_angles(length: int, head_dim: int) -> Tensor:
    """Return `(length, head_dim / 2)` angles, position times frequency."""
    frequencies = 10_000 ** -torch.linspace(0, 1, head_dim // 2)
    return torch.outer(torch.arange(length), frequencies)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of channels of x `(B, heads, L, head_dim)`, so that q k^T depends on distances alone."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
