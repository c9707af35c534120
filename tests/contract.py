"""What every backend promises, checked on every rank; the sentences are those of ``backends/contract.py``."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

from sharded_phema.backends import Backend
from sharded_phema.layout import ParamShard
from sharded_phema.replicas import settled
from sharded_phema.world import gather


def check_contract(backend: Backend, model: nn.Module, whole: dict[str, Tensor], optimizer: object = None) -> None:
    """Check the promises for a sharded model, given parameters and buffers of the same model unsharded, by name."""
    with CommDebugMode() as collectives:
        layout = backend.shard_layout(model, optimizer)
    assert collectives.get_total_counts() == 0

    names = [shard.name for shard in layout]
    assert names == list(whole), "names are those of the unwrapped model, tied parameters once"
    assert gather(names) == [names] * len(gather(names))

    for shard in layout:
        assert shard.global_shape == tuple(whole[shard.name].shape)
        assert torch.equal(shard.local.reshape(-1), cut(whole[shard.name], shard)), shard.name
        assert shard.current().data_ptr() == shard.local.data_ptr()
    check_cover(gather([(shard.name, shard.global_shape, shard.boxes, shard.replica) for shard in settled(layout)]))


def cut(tensor: Tensor, shard: ParamShard) -> Tensor:
    """The boxes of a shard out of the whole tensor, flattened end to end."""
    return torch.cat([tensor.new_empty(0), *(tensor[box.slices].reshape(-1) for box in shard.boxes)])


def check_cover(ranks: list[list[tuple]]) -> None:
    """Brute force: the first replicas' boxes hold every element once."""
    for pieces in zip(*ranks, strict=True):
        name, shape = pieces[0][:2]
        held = torch.zeros(shape, dtype=torch.int64)
        for _, _, boxes, replica in pieces:
            for box in boxes:
                if replica == 0:
                    held[box.slices] += 1
        assert held.eq(1).all(), f"{name}: {math.prod(shape)} elements, held {held.unique().tolist()} times"


def check_live(backend: Backend, model: nn.Module, inputs: Tensor, optimizer: object = None) -> None:
    """A write through ``local`` shows in the next forward, and writing back undoes it bit for bit."""
    with torch.no_grad():
        before = model(inputs)
        layout = backend.shard_layout(model, optimizer)
        saved = [shard.local.clone() for shard in layout]
        for shard in layout:
            shard.local.mul_(1.5)
        backend.publish(model, optimizer)
        assert not torch.equal(model(inputs), before)
        for shard, value in zip(layout, saved, strict=True):
            shard.local.copy_(value)
        backend.publish(model, optimizer)
        assert torch.equal(model(inputs), before)
