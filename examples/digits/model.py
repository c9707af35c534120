"""The network: a small class-conditional transformer in the preconditioning of Karras et al. 2022."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import CLASSES, SIDE, SIGMA_DATA

PATCH = 2
HEAD = 32
TOKENS = (SIDE // PATCH) ** 2


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything that fixes the network's shapes, and nothing that its weights do not tell.

    Attributes:
        width: Channels of each token, a multiple of ``HEAD``.
        depth: Number of transformer blocks.
    """

    width: int = 128
    depth: int = 3

    @property
    def heads(self) -> int:
        """Attention heads of each block."""
        return self.width // HEAD

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "ModelConfig":
        """The shapes of a network that has these weights."""
        blocks = {name.split(".")[2] for name in state if name.startswith("network.blocks.")}
        return cls(state["network.position"].shape[1], len(blocks))


class Preconditioning(NamedTuple):
    """The four functions of the noise level that surround the raw network."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def preconditioning(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Preconditioning:
    """Scalings that give the raw network inputs and targets of unit variance.

    Args:
        sigma: Noise levels, any shape, > 0.
        sigma_data: Standard deviation of the data.

    Source: Karras et al., arXiv:2206.00364, table 1, last column.
    """
    variance = sigma**2 + sigma_data**2
    return Preconditioning(
        c_skip=sigma_data**2 / variance,
        c_out=sigma * sigma_data * variance.rsqrt(),
        c_in=variance.rsqrt(),
        c_noise=sigma.log() / 4,
    )


class Block(nn.Module):
    """Attention and a two-layer network on each token, both scaled, shifted and gated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.condition = nn.Linear(width, 6 * width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        # Closed gates: each block starts as the identity, which is what makes a high learning rate survivable.
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens after the block; x is (batch, tokens, width), condition is (batch, width)."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.condition(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attend(modulate(x, scale1, shift1))
        return x + gate2 * self.narrow(F.gelu(self.widen(modulate(x, scale2, shift2))))

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over the tokens of each image."""
        query, key, value = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.join(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalises each token, then scales and shifts it."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


class Transformer(nn.Module):
    """Raw network F(x, c_noise, label) on images of (batch, 1, 8, 8), cut into 16 patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.register_buffer("frequencies", torch.pi * torch.logspace(-2, 1, width // 2, base=2.0), persistent=False)
        self.noise = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES, width)
        self.enter = nn.Linear(PATCH**2, width)
        self.position = nn.Parameter(0.1 * torch.randn(TOKENS, width))
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.leave = nn.Linear(width, PATCH**2)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        """F of x's shape; c_noise and label are (batch,)."""
        waves = c_noise[:, None] * self.frequencies
        condition = F.silu(self.noise(torch.cat([waves.cos(), waves.sin()], dim=1)) + self.label(label))
        x = self.enter(F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2)) + self.position
        for block in self.blocks:
            x = block(x, condition)
        x = self.leave(F.layer_norm(x, x.shape[-1:])).transpose(1, 2)
        return F.pixel_shuffle(x.unflatten(2, (SIDE // PATCH, SIDE // PATCH)), PATCH)


class Denoiser(nn.Module):
    """D(x; sigma, label): the raw network inside its preconditioning."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.network = Transformer(config)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """Estimate of the clean image.

        Args:
            x: Noisy images, (batch, 1, 8, 8).
            sigma: Noise level of each image, (batch,), > 0.
            label: Class of each image, (batch,), int64.
        """
        c_skip, c_out, c_in, _ = preconditioning(sigma[:, None, None, None])
        raw = self.network(c_in * x, preconditioning(sigma).c_noise, label)
        return c_skip * x + c_out * raw
