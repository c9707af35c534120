"""Run a function on several gloo ranks, and report the first rank that fails."""

import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing import connection, get_context
from typing import Any

import torch
import torch.distributed as dist

_mp = get_context("forkserver")
# Imports are paid once, in the server that the ranks are forked from.
_mp.set_forkserver_preload(
    [
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint",
        "torch.distributed.tensor.debug",
        "torch.distributed.tensor.parallel",
        "torch.testing",
        "torch._inductor.compile_fx",  # what DeepSpeed loads
        "pydantic.types",
        "setuptools",
        "hypothesis",
        "safetensors.torch",
        "sharded_phema.load",
        "sharded_phema.posthoc",
        "sharded_phema.rebuild",
    ]
)


def run_ranks(
    world_size: int, body: Callable[..., Any], *args: object, timeout: float = 120.0, dying: Collection[int] = ()
) -> list[Any]:
    """Return what ``body(*args)`` returned on each rank, in rank order; None for a rank that was to die and did.

    Args:
        world_size: Number of processes.
        body: A module-level function; it finds the process group ready.
        args: Picklable arguments.
        timeout: Seconds for all ranks together.
        dying: Ranks that may die; the others are heard to the end.

    Raises:
        AssertionError: A rank raised, died or hung. Names the rank, with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends, workers = [], []
        for rank in range(world_size):
            here, there = _mp.Pipe(duplex=False)
            worker = _mp.Process(target=_rank_main, args=(there, folder, rank, world_size, body, args))
            worker.start()
            there.close()
            ends.append(here)
            workers.append(worker)
        try:
            return _collect(ends, time.monotonic() + timeout, dying)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


def _collect(ends: list[connection.Connection], deadline: float, dying: Collection[int]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ends):
        waiting = [end for rank, end in enumerate(ends) if rank not in results]
        ready = connection.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(set(range(len(ends))) - set(results))} hung"
        for end in ready:
            rank = next(i for i, other in enumerate(ends) if other is end)
            try:
                failed, value = pickle.loads(end.recv_bytes())
            except EOFError:
                failed, value = rank not in dying, None if rank in dying else "died without a traceback"
            assert not failed, f"rank {rank} of {len(ends)}: {value}"
            results[rank] = value
    return [results[rank] for rank in range(len(ends))]


def _rank_main(end: Any, folder: str, rank: int, world_size: int, body: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)  # several ranks share the machine's cores
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
        _send(end, False, body(*args))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        _send(end, True, traceback.format_exc())


def _send(end: Any, failed: bool, value: Any) -> None:
    # By value: multiprocessing's own pickler shares the memory of tensors, which is gone with the rank.
    end.send_bytes(pickle.dumps((failed, value)))
