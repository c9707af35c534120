"""Scores: how well one set of weights denoises held-out digits and how closely its samples resemble digits."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import CLASSES, SIDE, Digits, Split
from diffusion import Denoise, denoising_loss, sample, training_sigmas

FEATURES = 32


@dataclass(frozen=True, slots=True)
class Effort:
    """How much work goes into the scores.

    Attributes:
        epochs: Passes of the feature classifier over the training digits.
        repeats: How often each held-out digit is denoised, each time with other noise.
        samples: Digits to generate for the Fréchet distance.
        steps: Steps of the sampler.
    """

    epochs: int = 15
    repeats: int = 8
    samples: int = 500
    steps: int = 12


ROUGH = Effort(epochs=2, repeats=1, samples=60, steps=4)
"""Scores in a few seconds: a test."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean (features,) and covariance (features, features) of a cloud of features, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor


class Classifier(nn.Module):
    """A small convolutional network that names the digit; its last hidden layer gives the features."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.SiLU(),
            nn.Flatten(), nn.Linear(8 * SIDE**2, FEATURES),
        )  # fmt: skip
        self.classes = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, 10)."""
        return self.classes(F.silu(self.features(images)))


def train_classifier(digits: Digits, epochs: int, batch: int = 64) -> Classifier:
    """A classifier of the digits; seed and order of the data are fixed, so that every rank gets the same.

    Noise and smoothed labels keep it from knowing its training digits by heart:
    otherwise its features tell those from other real digits before all else.
    """
    torch.manual_seed(0)
    classifier = Classifier()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=2e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(digits.labels)).split(batch):
            images = digits.images[chosen] + 0.3 * torch.randn_like(digits.images[chosen])
            loss = F.cross_entropy(classifier(images), digits.labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier.requires_grad_(False)


def statistics(features: Tensor) -> Statistics:
    """Mean and unbiased covariance of features of (count, features)."""
    features = features.double().cpu()
    return Statistics(features.mean(dim=0), features.T.cov())


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared 2-Wasserstein distance between the Gaussians that have these statistics.

    Source: Heusel et al., arXiv:1706.08500, equation 6.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    # root b root has the eigenvalues of a b, but it is symmetric, so that their square roots come out real.
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    return ((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


@torch.no_grad()
def held_out_loss(denoise: Denoise, digits: Digits, repeats: int) -> float:
    """Mean training loss on digits the network never saw, with the same noise whichever network is asked."""
    count, device = len(digits.labels), digits.labels.device
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(repeats):
        # Quantiles spread evenly and dealt at random: far less scatter than independent draws of the noise level.
        quantiles = (torch.randperm(count, generator=generator) + 0.5) / count
        sigma = training_sigmas(torch.special.ndtri(quantiles)).to(device)
        noise = torch.randn(digits.images.shape, generator=generator).to(device)
        total += denoising_loss(denoise, digits.images, digits.labels, sigma, noise).double().mean().item()
    return total / repeats


def generate(denoise: Denoise, effort: Effort, device: torch.device) -> Tensor:
    """Images, (samples, 1, 8, 8), of all classes in turn, from the same noise whichever network is asked."""
    noise = torch.randn(effort.samples, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).to(device)
    labels = torch.arange(effort.samples, device=device) % CLASSES
    return sample(denoise, noise, labels, effort.steps)


class Judge:
    """Scores networks against fixed digits, noise and features, so that only the weights differ."""

    def __init__(self, split: Split, effort: Effort, device: torch.device) -> None:
        self._held_out, self._effort, self._device = split.held_out.to(device), effort, device
        # On the CPU of every rank, where the same seed gives the same features.
        self._classifier = train_classifier(split.train, effort.epochs)
        self._real = statistics(self._classifier.features(split.train.images))

    def accuracy(self) -> float:
        """Part of the held-out digits that the classifier names rightly."""
        named = self._classifier(self._held_out.images.cpu()).argmax(dim=1)
        return (named == self._held_out.labels.cpu()).float().mean().item()

    def frechet(self, images: Tensor) -> float:
        """Fréchet distance of the images' features from those of the training digits."""
        return frechet_distance(statistics(self._classifier.features(images.cpu())), self._real)

    def frechet_of_held_out(self) -> float:
        """Fréchet distance of real digits that nobody trained on, for scale."""
        return self.frechet(self._held_out.images)

    def frechet_of(self, denoise: Denoise) -> float:
        """Fréchet distance of what one network generates."""
        return self.frechet(generate(denoise, self._effort, self._device))

    def loss_of(self, denoise: Denoise) -> float:
        """Held-out denoising loss of one network."""
        return held_out_loss(denoise, self._held_out, self._effort.repeats)
