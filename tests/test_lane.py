"""Lanes: updates beside the training see the weights of their own step, however slow they are."""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import no_flush
from matrix import KINDS, assembled, pieces
from ranks import run_ranks
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from sharded_phema.errors import TargetError
from sharded_phema.kernels import kernels_for, offload
from sharded_phema.lane import AtOnce, Lane, OnStream, OnThread, lane_of, steps_wait
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.store import open_run

SLOW = 0.02
"""Seconds that an update is late; a step of the models here takes a tenth of it."""


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with no_flush():
        yield


class Stream:
    """A CUDA stream as torch shows it: a queue of its own, worked off by a thread, behind the host."""

    def __init__(self, device: Any = None) -> None:
        self._queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self._queue.get()()

    def launch(self, act: Callable[[], object]) -> None:
        self._queue.put(act)

    def record_event(self) -> threading.Event:
        event = threading.Event()
        self.launch(event.set)
        return event

    def wait_event(self, event: threading.Event) -> None:
        self.launch(event.wait)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        assert self.record_event().wait(20)


class Cuda:
    """What ``OnStream`` uses of ``torch.cuda``; kernels go to the current stream by ``launch``."""

    Stream = Stream

    def __init__(self) -> None:
        self._current = self.main = Stream()

    def current_stream(self, device: Any = None) -> Stream:
        return self._current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def launch(self, act: Callable[[], object]) -> None:
        self._current.launch(act)


class Counting(torch.optim.Optimizer):
    """Adds one to a number, through ``launch``."""

    def __init__(self, number: torch.Tensor, launch: Callable[[Callable[[], object]], object]) -> None:
        super().__init__([number], {})
        self.number, self.launch = number, launch

    def step(self, closure: Any = None) -> None:
        self.launch(lambda: self.number.add_(1))


def seen_beside(lane: Lane, cuda: Cuda, optimizer: Counting, steps: int = 8) -> list[float]:
    """The numbers that slow updates read, one after each step."""
    seen: list[float] = []

    def update() -> None:
        def read() -> None:
            time.sleep(SLOW)
            seen.append(optimizer.number.item())

        cuda.launch(read)

    began = time.monotonic()
    for _ in range(steps):
        optimizer.step()
        lane.run(update)
    assert time.monotonic() - began < SLOW * (steps - 1), "the host waits for nothing"
    lane.wait()
    cuda.main.synchronize()
    return seen


def test_a_slow_stream_reads_the_weights_of_its_step_because_the_next_one_waits() -> None:
    cuda = Cuda()
    lane, optimizer = OnStream(torch.device("cpu"), cuda), Counting(torch.zeros(()), cuda.launch)
    release = steps_wait(lane)
    try:
        assert seen_beside(lane, cuda, optimizer) == [1, 2, 3, 4, 5, 6, 7, 8]
    finally:
        release()


def test_without_the_wait_of_steps_a_slow_stream_reads_later_weights() -> None:
    # The control: the fakes do race, as a side stream does whose optimizer step waits for nothing.
    cuda = Cuda()
    lane, optimizer = OnStream(torch.device("cpu"), cuda), Counting(torch.zeros(()), cuda.launch)
    assert seen_beside(lane, cuda, optimizer)[0] > 1


def test_what_comes_after_a_wait_on_the_current_stream_comes_after_the_act() -> None:
    cuda, order = Cuda(), []
    lane = OnStream(torch.device("cpu"), cuda)
    for number in range(3):
        cuda.launch(partial(order.append, f"before {number}"))
        lane.run(lambda: cuda.launch(lambda: (time.sleep(SLOW), order.append("act"))))
        lane.wait()
        cuda.launch(partial(order.append, f"after {number}"))
    lane.close()
    cuda.main.synchronize()
    assert order == [word for n in range(3) for word in (f"before {n}", "act", f"after {n}")]


def test_a_thread_runs_one_act_at_a_time_and_tells_what_it_raised() -> None:
    lane, running, most = OnThread(), [], []

    def act() -> None:
        running.append(1)
        time.sleep(SLOW)
        most.append(len(running))
        running.pop()

    for _ in range(4):
        lane.run(act)
    lane.wait()
    assert most == [1, 1, 1, 1]
    lane.run(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lane.wait()
    lane.wait()
    lane.close()
    lane.close()


def test_which_lane_runs_where() -> None:
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert isinstance(lane_of([cpu, other], overlap=False, offload=False), AtOnce)
    assert isinstance(lane_of([cpu], overlap=True, offload=False), OnThread)
    assert isinstance(lane_of([other], overlap=False, offload=True), OnThread)
    assert isinstance(lane_of([], overlap=True, offload=True), AtOnce)
    with pytest.raises(TargetError, match="on one device, found cpu, meta"):
        lane_of([cpu, other], overlap=True, offload=False)


# Whole runs.


def slowed(ema: PostHocEMA) -> PostHocEMA:
    """The same, every update of which begins late."""
    move = ema._averages._move

    def late(weights: Any) -> None:
        time.sleep(SLOW)
        move(weights)

    for name in ("check", "skipped"):
        setattr(late, name, getattr(move, name))
    ema._averages._move = late
    return ema


def beside_body(kind: str, root: Path, options: dict[str, bool]) -> tuple[list, list, list]:
    """Pieces of the averages of two runs along one training: at once, and beside it; and of what they stored."""
    offload.CHUNK = 50  # many chunks, and tensors cut by them
    with KINDS[kind].make() as sharded:
        make = partial(PostHocEMA, sharded.model, snapshot_every=3, optimizer=sharded.optimizer)
        usual, beside = make(root / "usual"), slowed(make(root / "beside", **options))
        for step in range(1, 8):
            sharded.step(step)
            usual.update(step)
            beside.update(step)
        with torch.no_grad(), beside.swapped(sigma_rel=0.10):
            swapped = sharded.forward(torch.ones(4, 8))
        with torch.no_grad(), usual.swapped(sigma_rel=0.10):
            assert torch.equal(swapped, sharded.forward(torch.ones(4, 8)))
        found = [pieces(ema._averages_by_label()) for ema in (usual, beside)]
        sharded.step(8)
        beside.update(8)
        beside.close()
        return found[0], found[1], [str(s.t) for s in open_run(root / "beside").snapshots]


@pytest.mark.parametrize("options", [{"overlap": True}, {"offload": True}], ids=["overlap", "offload"])
@pytest.mark.parametrize("kind", ["plain", "fsdp2", "fsdp1", "fsdp1-flat", "zero1", "zero3"])
def test_updates_beside_the_training_give_the_same_bits(tmp_path, kind, options) -> None:
    # Oracle: the same training's averages that were updated at once.
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    ranks = run_ranks(min(KINDS[kind].ranks, 2), beside_body, kind, tmp_path, options, timeout=240.0)
    usual, beside = (assembled([rank[i] for rank in ranks]) for i in range(2))
    for label, average in usual.items():
        assert all(torch.equal(beside[label][name], value) for name, value in average.items())
    assert ranks[0][2] == ["3.0", "6.0", "8.0"]


def engine_body(stage: int, root: Path) -> list[list]:
    """The same with an engine whose masters and optimizer are in host memory already."""
    from zero_engines import Recipe, check_configured, engine_of, train_step

    offload.CHUNK = 50
    held: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
    held |= {"offload_param": {"device": "cpu"}} if stage == 3 else {}
    keeper = "DeepSpeedZeroOptimizer_Stage3" if stage == 3 else "DeepSpeedZeroOptimizer"
    recipe = Recipe(stage, keeper, torch.bfloat16, zero=held, adam="cpu")
    with engine_of(recipe) as engine:
        make = partial(PostHocEMA, engine, snapshot_every=1e9)
        beside = {name: slowed(make(root / name, **{name: True})) for name in ("overlap", "offload")}
        emas = [make(root / "usual"), *beside.values()]
        for _ in range(6):
            train_step(engine, torch.bfloat16)
            for ema in emas:
                ema.update()
        check_configured(engine, recipe)
        found = [pieces(ema._averages_by_label()) for ema in emas]
        for ema in emas:
            ema.close()
        return found


@pytest.mark.parametrize("stage", [2, 3])
def test_masters_in_host_memory_are_averaged_beside_the_training_with_the_same_bits(tmp_path, stage) -> None:
    pytest.importorskip("deepspeed")
    ranks = run_ranks(2, engine_body, stage, tmp_path, timeout=240.0)
    usual, *others = (assembled([rank[i] for rank in ranks]) for i in range(3))
    for label, average in usual.items():
        for other in others:
            assert average and all(torch.equal(other[label][name], value) for name, value in average.items())


def test_without_the_wait_of_steps_the_averages_are_wrong(tmp_path) -> None:
    # The control: the delay is long enough for the next step to overtake the update.
    with KINDS["plain"].make() as sharded:
        make = partial(PostHocEMA, sharded.model, snapshot_every=1e9)
        usual, beside = make(tmp_path / "usual"), slowed(make(tmp_path / "beside", overlap=True))
        beside._averages._release()
        for step in range(1, 8):
            sharded.step(step)
            usual.update(step)
            beside.update(step)
        pairs = zip(usual._averages.layout(0), beside._averages.layout(0), strict=True)
        assert not all(torch.equal(a.local, b.local) for a, b in pairs)


@pytest.mark.parametrize("options", [{"overlap": True}, {"offload": True}])
def test_a_guard_works_beside_the_training(tmp_path, options) -> None:
    model = nn.Linear(40, 30)
    ema = PostHocEMA(model, tmp_path, snapshot_every=1e9, non_finite="skip", **options)
    ema.update()
    ema.wait()
    kept = [shard.local.clone() for shard in ema._averages.layout(0)]
    with torch.no_grad():
        model.bias[3] = torch.nan
    ema.update()
    assert ema.skipped == 1
    assert all(torch.equal(a, s.local) for a, s in zip(kept, ema._averages.layout(0), strict=True))
    ema.close()


def test_state_saved_beside_the_training_is_of_the_last_update(tmp_path) -> None:
    model = nn.Linear(3, 2)
    ema = slowed(PostHocEMA(model, tmp_path / "a", overlap=True))
    ema.update()
    fresh = PostHocEMA(model, tmp_path / "b")
    fresh.load_state_dict(ema.state_dict())
    assert torch.equal(fresh._averages.layout(0)[0].local, model.weight)


def test_optimizers_are_held_up_no_longer_once_a_run_is_closed_or_gone(tmp_path) -> None:
    before = len(_global_optimizer_pre_hooks)
    ema = PostHocEMA(nn.Linear(3, 2), tmp_path / "a", overlap=True)
    ema.update()
    assert len(_global_optimizer_pre_hooks) == before + 1
    ema.close()
    assert len(_global_optimizer_pre_hooks) == before
    forgotten = PostHocEMA(nn.Linear(3, 2), tmp_path / "b", overlap=True)
    forgotten._averages._lane.run(lambda: 1 / 0)
    del forgotten
    gc.collect()
    assert len(_global_optimizer_pre_hooks) == before
    PostHocEMA(nn.Linear(3, 2), tmp_path / "c")
    assert len(_global_optimizer_pre_hooks) == before, "nothing to wait for"


# Offload.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_parameters_travel_in_chunks_and_in_two_rooms_at_most(monkeypatch, dtype) -> None:
    monkeypatch.setattr(offload, "CHUNK", 64)
    params = [torch.randn(shape).to(dtype) for shape in [(3, 50), (200,), (), (0, 4), (7,), (30, 5)]]
    params += [torch.randn(20, 9).to(dtype).mT, torch.randn(50, 70).to(dtype)[::7]]
    averages = [[torch.randn(p.shape) for p in params] for _ in range(3)]
    expected = [[a.clone() for a in average] for average in averages]
    (usual,), (kernel,) = kernels_for("auto", expected, params), kernels_for("auto", averages, params, offload=True)
    rooms = {copy.untyped_storage().data_ptr(): copy for chunk in kernel._chunks for copy in chunk._copies}
    assert len(rooms) == 2
    assert all(r.untyped_storage().nbytes() <= 64 * dtype.itemsize + 16 * 64 for r in rooms.values())
    for weights in ((1.0, 0.3, 0.01), (0.0, 0.7, 1e-4)):
        usual(weights)
        kernel(weights)
    for found, truth in zip(chain(*averages), chain(*expected), strict=True):
        assert torch.equal(found, truth)
    assert bool(kernel.finite())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{"overlap": True}, {"offload": True}])
def test_on_a_device_slow_updates_give_the_same_bits(tmp_path, options) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    usual = PostHocEMA(model, tmp_path / "usual", snapshot_every=1e9)
    beside = PostHocEMA(model, tmp_path / "beside", snapshot_every=1e9, **options)
    move = beside._averages._move

    def late(weights: Any) -> None:
        torch.cuda._sleep(20_000_000)
        move(weights)

    beside._averages._move = late
    for _ in range(10):
        model(torch.randn(4, 256, device="cuda")).square().mean().backward()
        optimizer.step()
        usual.update()
        beside.update()
    beside.wait()
    for index in range(2):
        for a, b in zip(usual._averages.layout(index), beside._averages._values[index], strict=True):
            assert torch.equal(a.local.cpu(), b.cpu()) or options == {"offload": True}
            torch.testing.assert_close(a.local.cpu(), b.cpu(), rtol=1e-6, atol=1e-7)
