"""The data: the 1,797 handwritten digits of scikit-learn, cut once into a training and a held-out part."""

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

SIDE = 8
CLASSES = 10
SIGMA_DATA = 0.5
HELD_OUT = 360
SPLIT_SEED = 2402


class Digits(NamedTuple):
    """Images of (count, 1, 8, 8), float32, mean 0 and standard deviation 0.5, with their labels (count,)."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Digits":
        """The same digits on another device."""
        return Digits(self.images.to(device), self.labels.to(device))

    def shard(self, rank: int, world_size: int) -> "Digits":
        """The part of one rank: every ``world_size``-th digit."""
        return Digits(self.images[rank::world_size], self.labels[rank::world_size])

    def rows(self, count: int) -> Tensor:
        """The first images of every class, as ``count`` rows of one image a class."""
        first = [self.images[self.labels == label][:count] for label in range(CLASSES)]
        return torch.stack(first, dim=1).flatten(0, 1)


class Split(NamedTuple):
    """Digits to train on, digits to judge by, and the map back to pixel values."""

    train: Digits
    held_out: Digits
    mean: float
    scale: float

    def pixels(self, images: Tensor) -> Tensor:
        """Grey values, 0 for paper to 1 for ink, of images in the units of training."""
        return ((images / self.scale + self.mean) / 16).clamp(0, 1)


def load_split() -> Split:
    """All digits, shuffled with a fixed seed; the last 360 (20 %) are held out."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    raw = torch.from_numpy(pixels).float().reshape(-1, 1, SIDE, SIDE)[order]
    label = torch.from_numpy(labels).long()[order]
    # The preconditioning supposes centred data of a known spread; both are measured on the training part alone.
    mean, scale = raw[:-HELD_OUT].mean().item(), SIGMA_DATA / raw[:-HELD_OUT].std().item()
    digits = Digits((raw - mean) * scale, label)
    train, held_out = (Digits(*(part[cut] for part in digits)) for cut in (slice(-HELD_OUT), slice(-HELD_OUT, None)))
    return Split(train, held_out, mean, scale)
