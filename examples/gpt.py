"""A small GPT in plain torch, for the examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["GPT", "Block"]


class Block(nn.Module):
    """Causal attention and a feed-forward part, each beside the stream of width ``width``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """One layer on ``x``, of shape (batch, length, width)."""
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Next-token prediction over ``vocab`` tokens, by default bytes.

    Args:
        vocab: How many tokens there are.
        width: Size of the stream, a multiple of ``heads``.
        layers: How many blocks.
        heads: Attention heads in each.
        length: Longest input, in tokens.
    """

    def __init__(self, vocab: int = 256, width: int = 128, layers: int = 4, heads: int = 4, length: int = 128) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits of shape (batch, length, vocab), and the mean loss where ``labels`` are given.

        Args:
            input_ids: Tokens, of shape (batch, length).
            labels: The tokens themselves, shifted here: each place is asked for the next one.
        """
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        if labels is None:
            return logits, None
        return logits, functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
