"""Networks: the small models of the trainings, with their data and losses."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

__all__ = ["Loss", "classifier", "denoiser", "language_model"]

Loss = Callable[[torch.Generator], Tensor]
"""Draws a batch with the generator and gives its loss."""

_VOCABULARY = 128


def denoiser(*, width: int, batch: int) -> tuple[nn.Module, Loss]:
    """Diffusion denoiser of 8 x 8 handwritten digits: a residual MLP that sees the noise level."""
    digits = torch.tensor(load_digits().data, dtype=torch.float32) / 8.0 - 1.0  # (1797, 64)
    model = _ResidualMLP(digits.shape[1] + 2, width, digits.shape[1])

    def loss(generator: torch.Generator) -> Tensor:
        clean = digits[torch.randint(len(digits), (batch,), generator=generator)]
        angle = torch.rand(batch, 1, generator=generator) * (torch.pi / 2)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = angle.cos() * clean + angle.sin() * noise
        velocity = angle.cos() * noise - angle.sin() * clean
        return F.mse_loss(model(torch.cat([noisy, angle.cos(), angle.sin()], dim=1)), velocity)

    return model, loss


def classifier(*, width: int, batch: int) -> tuple[nn.Module, Loss]:
    """Classifier of 8 x 8 handwritten digits under pixel noise, so that the loss does not fall to 0."""
    data = load_digits()
    digits = torch.tensor(data.data, dtype=torch.float32) / 8.0 - 1.0  # (1797, 64)
    labels = torch.tensor(data.target)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))

    def loss(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(digits), (batch,), generator=generator)
        noise = 0.5 * torch.randn(batch, 64, generator=generator)
        return F.cross_entropy(model(digits[chosen] + noise), labels[chosen])

    return model, loss


def language_model(*, width: int, batch: int, context: int) -> tuple[nn.Module, Loss]:
    """Two-layer transformer on the bytes of Python's standard library."""
    text = _standard_library()
    model = _Transformer(width, context)

    def loss(generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(text) - context - 1, (batch, 1), generator=generator)
        window = text[starts + torch.arange(context + 1)]  # (batch, context + 1)
        logits = model(window[:, :-1])
        return F.cross_entropy(logits.reshape(-1, _VOCABULARY), window[:, 1:].reshape(-1))

    return model, loss


def _standard_library() -> Tensor:
    folder = Path(sysconfig.get_paths()["stdlib"])
    source = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(source), dtype=torch.uint8).clamp(max=_VOCABULARY - 1).long()


class _ResidualMLP(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.leave = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for block in self.blocks:
            h = h + block(h)
        return self.leave(h)


class _Transformer(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(_VOCABULARY, width)
        self.place = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, _VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.token(tokens) + self.place[: tokens.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.leave(self.norm(h))


class _Block(nn.Module):
    """Pre-norm attention with heads of size 16, then an MLP of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 16
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        batch, length, width = h.shape
        qkv = self.qkv(self.first(h)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, 16)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return h + self.mlp(self.second(h))
