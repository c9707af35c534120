"""Diffusion: the training loss and the sampler of Karras et al. 2022 (arXiv:2206.00364)."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from data import SIGMA_DATA

LOG_MEAN = -1.2
LOG_STD = 1.2

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]


def loss_weight(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """lambda(sigma) = 1 / c_out(sigma)^2, which makes the loss of an untrained network 1 at every noise level."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def training_sigmas(normal: Tensor) -> Tensor:
    """Log-normal noise levels from standard normal numbers of any shape."""
    return torch.exp(LOG_MEAN + LOG_STD * normal)


def denoising_loss(denoise: Denoise, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Weighted squared error of each image, (batch,), averaged over its pixels.

    Args:
        denoise: D(x; sigma, label).
        images: Clean images, (batch, 1, 8, 8).
        labels: Their classes, (batch,).
        sigma: Their noise levels, (batch,).
        noise: Standard normal numbers of the images' shape.

    Source: equations 2 and 3 with the weight of table 1.
    """
    noisy = images + sigma[:, None, None, None] * noise
    error = (denoise(noisy, sigma, labels) - images).square().mean(dim=(1, 2, 3))
    return loss_weight(sigma) * error


def sampling_sigmas(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """The noise levels of the sampler from high to low and then 0, (steps + 1,), float64. Source: equation 5."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


@torch.no_grad()
def sample(denoise: Denoise, noise: Tensor, labels: Tensor, steps: int) -> Tensor:
    """Images that follow from the noise alone: Heun's method without added noise.

    Args:
        denoise: D(x; sigma, label).
        noise: Standard normal numbers, (batch, 1, 8, 8).
        labels: Classes to draw, (batch,).
        steps: Number of steps; the network runs ``2 * steps - 1`` times.

    Source: algorithm 1.
    """
    sigmas = sampling_sigmas(steps).tolist()
    x = sigmas[0] * noise
    for sigma, following in pairwise(sigmas):
        slope = (x - denoise(x, x.new_full((len(x),), sigma), labels)) / sigma
        ahead = x + (following - sigma) * slope
        if following > 0:
            slope_ahead = (ahead - denoise(ahead, x.new_full((len(x),), following), labels)) / following
            ahead = x + (following - sigma) * (slope + slope_ahead) / 2
        x = ahead
    return x
