"""Metrics that ``sharded-phema sweep`` calls with rebuilt weights; the rough ones take seconds: a test.

sharded-phema sweep runs/demo/ema --metric examples/digits/metric.py:frechet
"""

import os
from functools import cache

import torch
from torch import Tensor

from data import Split, load_split
from model import Denoiser, ModelConfig
from scores import ROUGH, Effort, Judge, held_out_loss

State = dict[str, Tensor]


def frechet(state: State) -> float:
    """Fréchet distance of generated digits from those of the training."""
    return _judge(Effort()).frechet_of(_network(state))


def loss(state: State) -> float:
    """Denoising loss on held-out digits."""
    return held_out_loss(_network(state), _split().held_out.to(_device()), Effort().repeats)


def rough_frechet(state: State) -> float:
    """The same as ``frechet``, with far less work."""
    return _judge(ROUGH).frechet_of(_network(state))


def rough_loss(state: State) -> float:
    """The same as ``loss``, with less work."""
    return held_out_loss(_network(state), _split().held_out.to(_device()), ROUGH.repeats)


@cache
def _split() -> Split:
    return load_split()


@cache
def _judge(effort: Effort) -> Judge:
    """Made once: it trains the classifier whose features are compared."""
    return Judge(_split(), effort, _device())


def _network(state: State) -> Denoiser:
    network = Denoiser(ModelConfig.of(state)).to(_device())
    network.load_state_dict(state, strict=True)
    return network.requires_grad_(False)


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
