"""Sweeps: scores of rebuilt averages, each measured once, in bounded memory, on one process or several."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from builders import Free, listing, no_flush, same_bits, tensors_of, unclaimed
from commands import run
from models import gathered
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sharded_phema import scores as scores_module
from sharded_phema.errors import ModelMismatch, OrderError, OutputError, PhemaError, StoreError, TargetError
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct
from sharded_phema.recipe import Plan
from sharded_phema.scores import Second, read_scores
from sharded_phema.store import open_run
from sharded_phema.sweeping import Command, folders, states, sweep
from sharded_phema.sweeping.curves import curves_of
from sharded_phema.sweeping.ranges import expand_seconds, expand_targets, expand_times
from sharded_phema.sweeping.search import descend, search
from sharded_phema.tally import tally

STEPS, EVERY = 400, 50
GRID = ["0.03", "0.05", "0.08", "0.13", "0.2"]
KEYS = ["version", "run", "unit", "metric", "target", "t", "score", "forecast", "seconds"]
KEYS += ["sigma_rel", "group", "base", "second", "repeat"]
State = dict[str, Tensor]


@pytest.fixture(autouse=True, scope="module")
def quick_disk() -> Iterator[None]:
    with no_flush():
        yield


class Walker(nn.Module):
    """Two parts whose weights a test walks, a frozen parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Free(q=(30, 20), k=(7,))
        self.mlp = nn.Linear(20, 10)
        self.still = nn.Parameter(torch.arange(3.0), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def walked(model: nn.Module, *tracked: PostHocEMA) -> None:
    """A random walk of all that trains, the same at every call."""
    steps = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for step in range(1, STEPS + 1):
            for param in filter(lambda param: param.requires_grad, model.parameters()):
                noise = 0.01 * torch.randn(param.shape, generator=steps)
                if isinstance(param, DTensor):
                    noise = torch.distributed.tensor.distribute_tensor(noise, param.device_mesh, param.placements)
                param.add_(noise)
            model.count += 1
            for one in tracked:
                one.update(step)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and beside it two widths that were tracked all the way."""
    folder, model = tmp_path_factory.mktemp("sweep"), Walker()
    with (
        PostHocEMA(model, folder / "ema", snapshot_every=EVERY) as ema,
        PostHocEMA(model, folder / "truth", sigma_rels=(0.07, 0.13), snapshot_every=STEPS) as truth,
    ):
        walked(model, ema, truth)
    reconstruct(folder / "truth", ["0.07", "0.13"], out=folder / "tracked")
    return folder


@pytest.fixture(scope="module")
def ema(folder: Path) -> Path:
    return folder / "ema"


def distance_to(truth: State, names: str = "") -> Callable[[State], float]:
    """Squared distance to an average that was tracked: lowest at its width."""
    return lambda state: float(sum((state[n] - truth[n]).square().sum() for n in truth if n.startswith(names)))


@pytest.fixture(scope="module")
def distance(folder: Path) -> Callable[[State], float]:
    return distance_to(tensors_of(folder / "tracked" / "0.13"))


class Counted:
    """A metric that tells how often it was called, and with what."""

    def __init__(self, metric: Callable[..., float]) -> None:
        self.func, self.calls = metric, []  # as a partial function names what it calls

    def __call__(self, weights: Any, target: str, t: float, repeat: int, **second: float) -> float:
        self.calls.append((target, t, repeat, *second.values()))
        return self.func(weights, **second)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def once(plan: Plan) -> int:
    """Bytes of each stored average that a plan uses, read once; so small a file is one block, which is read whole."""
    return sum(file.stat().st_size for s in plan.sources for file in Path(s.snapshot.where).glob("*.safetensors"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.02:0.05:0.01", ["0.02", "0.03", "0.04", "0.05"]),
        ("0.02:0.28:0.13,0.02", ["0.02", "0.15", "0.28"]),
        ("0.1:0.16:0.025", ["0.1", "0.125", "0.15"]),
        (["0.1", 0.2, "uniform"], ["0.1", "0.2", "uniform"]),
        (
            "exponential:tau=100,ramp=0.05,exponential:tau=100,corrected,start=5,window:0.2",
            ["exponential:tau=100,ramp=0.05", "exponential:tau=100,corrected,start=5", "window:0.2"],
        ),
        ("decay:linear:0.2, 0.1@t=50", ["decay:linear:0.2", "0.1@t=50"]),
    ],
)  # fmt: skip
def test_texts_of_targets_are_spread_in_decimals_and_each_counts_once(text, expected) -> None:
    assert [target.text for target in expand_targets(text)] == expected
    assert len(expand_targets("0.02:0.28:0.01")) == 27
    assert len(expand_targets("0.03:0.25")) == 9


@pytest.mark.parametrize("text", ["", [], "0.2:0.1:0.01", "0.1:0.2:0", "0.1:0.2:1e-9", "0.1:0.5:0.1", "nonsense"])
def test_texts_that_are_no_targets_are_refused(text) -> None:
    with pytest.raises(TargetError):
        expand_targets(text)


def test_times_and_values_of_a_second_parameter_are_read_from_text(ema) -> None:
    held = open_run(ema)
    assert expand_times(held, ()) == expand_times(held, "") == (400,)
    assert expand_times(held, "all") == tuple(range(50, 401, 50))
    assert expand_times(held, "count=3") == (100, 250, 400) and len(expand_times(held, "count=99")) == 8
    assert expand_times(held, "300,100,100") == expand_times(held, [100, 300]) == (100, 300)
    assert expand_seconds(None) == (None,)
    values = (Second("w", 1.0), Second("w", 2.0))
    assert expand_seconds("w=1.0,2,1") == expand_seconds({"w": [1, 2]}) == values
    for bad in ("401", "49", "soon", "count=0", "count=x", "nan"):
        with pytest.raises(TargetError, match=r"times|time"):
            expand_times(held, bad)
    for wrong in ("t=1", "w", "w=", "=1", "w=a", "two words=1", {"a": [1], "b": [2]}, {"a": []}):
        with pytest.raises(TargetError, match="second"):
            expand_seconds(wrong)


def test_a_metric_is_given_what_reconstruct_writes_and_its_scores_are_kept(ema, distance, tmp_path) -> None:
    wanted, before, seen = [*GRID, "window:0.3", "0.1@t=220"], listing(ema), {}

    def metric(state: State, target: str, t: float) -> float:
        seen[target, t] = state
        return distance(state)

    found = sweep(ema, wanted, metric, scores=tmp_path / "scores.jsonl")
    plan = reconstruct(ema, wanted, out=tmp_path / "out")
    for output, planned, score in zip(plan.outputs, plan.targets, found, strict=True):
        expected = tensors_of(tmp_path / "out" / output.output.slug)
        state = seen[score.target, score.t]
        assert state.keys() == expected.keys() and all(same_bits(state[name], expected[name]) for name in expected)
        assert score.score == distance(expected)
        assert score.forecast == planned.fit.forecast and score.t == planned.t
    assert unclaimed(listing(ema)) == unclaimed(before), "the run is only read"
    held = lines(tmp_path / "scores.jsonl")
    assert all(list(line) == KEYS for line in held) and read_scores(tmp_path / "scores.jsonl") == tuple(found)
    first, timed = held[0], held[-1]
    assert (first["target"], first["sigma_rel"], first["t"], first["unit"]) == ("0.03", 0.03, 400.0, "steps")
    assert (timed["target"], timed["t"], timed["group"], timed["base"], timed["second"]) == ("0.1", 220, *[None] * 3)
    assert held[-2]["sigma_rel"] is None and first["run"] == open_run(ema).record.run and first["repeat"] == 0
    assert first["metric"].startswith("test_sweep:") and first["seconds"] >= 0


def test_a_batch_is_one_pass_and_as_large_as_the_memory_allows(ema, distance, tmp_path) -> None:
    size = sum(tensor.nbytes for tensor in tensors_of(ema.parent / "tracked" / "0.13").values())
    plans, feeds = [], []

    class Feed(states.Feed):
        def __init__(self, losses: Any) -> None:
            super().__init__(losses)
            feeds.append(self)

    def planned(*args: Any, **options: Any) -> Any:
        plans.append(real(*args, **options))
        return plans[-1]

    real, memory = states.plan_rebuild, states.BUFFERS + 3 * (size + states.ROW)
    with mock.patch.object(states, "plan_rebuild", planned), mock.patch.object(states, "Feed", Feed):
        sweep(ema, "0.03:0.09:0.01", distance, scores=tmp_path / "scores.jsonl", memory=memory)
        assert [len(plan.outputs) for plan in plans] == [3, 3, 1]
        assert [feed.bytes_read for feed in feeds] == [once(plan) for plan in plans]
        with pytest.raises(TargetError, match=f"one rebuilt model takes .*found a limit of {memory // 9}"):
            sweep(ema, "0.2", distance, scores=tmp_path / "scores.jsonl", memory=memory // 9)


def test_folders_are_rebuilt_as_many_at_once_as_the_disk_allows_and_are_gone_afterwards(ema, tmp_path) -> None:
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "config.json").write_text("{}")
    at_once, passes = [], []

    def metric(place: Path, target: str) -> float:
        assert json.loads((place / "phema.json").read_text())["target"] == f"{target}@t=400"
        assert (place / "config.json").is_file() and tensors_of(place)["mlp.weight"].dtype == torch.bfloat16
        at_once.append(len([*place.parent.iterdir()]))
        return float(target)

    one = 2 * (600 + 7 + 200 + 10 + 3) + 8 + 1000  # bfloat16, the buffer, and a header
    options = {"form": "folder", "like": tmp_path / "like", "dtype": "bfloat16", "disk": 2 * one}
    real = folders.reconstruct

    def rebuilt(*args: Any, **more: Any) -> Any:
        plan = real(*args, **more)
        passes.append(plan.summary.read - once(plan))
        return plan

    with mock.patch.object(folders, "reconstruct", rebuilt):
        found = sweep(ema, GRID, metric, scores=tmp_path / "s.jsonl", **options)
    assert [score.score for score in found] == [float(width) for width in GRID]
    assert at_once == [2, 2, 2, 2, 1]
    # Beside each stored average, once, what is stored as it is: three floats and a whole number.
    assert passes == [3 * 4 + 8] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["like", "s.jsonl"]
    with pytest.raises(OutputError, match=r"one rebuilt model takes .*found a limit of 100"):
        sweep(ema, "0.2", metric, scores=tmp_path / "s.jsonl", **(options | {"disk": 100}))


def test_nothing_is_measured_twice_and_more_can_be_asked_for_later(ema, distance, tmp_path) -> None:
    metric, path = Counted(distance), tmp_path / "scores.jsonl"
    first = sweep(ema, GRID, metric, scores=path)
    assert [call[0] for call in metric.calls] == GRID
    text = path.read_bytes()
    assert sweep(ema, GRID, metric, scores=path) == first
    assert len(metric.calls) == len(GRID) and path.read_bytes() == text
    more = sweep(ema, ["0.1", *GRID], metric, scores=path, repeats=2, times="200,400")
    asked = {(target, t, repeat) for target in ["0.1", *GRID] for t in (200, 400) for repeat in (0, 1)}
    assert {(score.target, score.t, score.repeat) for score in more} == asked
    assert len(metric.calls) == len(set(metric.calls)) == len(asked)
    progress: list[tuple[int, int]] = []
    sweep(ema, ["0.1", "0.11"], metric, scores=path, progress=lambda *told: progress.append(told))
    assert progress == [(1, 2), (2, 2)]


def test_damaged_snapshots_are_left_out_of_all_batches(ema, distance, tmp_path) -> None:
    # Oracle: what is rebuilt of the whole run when that snapshot is left out as asked.
    shutil.copytree(ema, tmp_path / "run")
    victim = Path(open_run(tmp_path / "run").snapshots[4].where)
    part = next(victim.glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    options = {"tolerance": "exact", "memory": states.BUFFERS + 2 * (states.ROW + 5000)}
    found = sweep(
        tmp_path / "run", GRID, lambda state: float(state.pop("mlp.weight").sum()), scores=tmp_path / "s", **options
    )
    reconstruct(ema, GRID, out=tmp_path / "out", tolerance="exact", leave_out=[victim.name])
    expected = [float(tensors_of(tmp_path / "out" / width)["mlp.weight"].sum()) for width in GRID]
    # Sums of so few terms are rounded by 1e-7 of their size; how many targets are solved for at once shows there too.
    assert [score.score for score in found] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def forked(body: Callable[[], object]) -> int:
    """How a child process ends that runs ``body``."""
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_sweep_that_is_killed_anywhere_goes_on_and_repeats_nothing_that_was_finished(ema, distance, tmp_path) -> None:
    path, log = tmp_path / "scores.jsonl", tmp_path / "log"
    kills = iter(range(100))

    def go(kill_in_call: int, kill_in_write: int) -> None:
        calls, writes, write = iter(range(100)), iter(range(100)), os.write

        def metric(state: State, target: str) -> float:
            if next(calls) == kill_in_call:
                os.kill(os.getpid(), signal.SIGKILL)
            with log.open("a") as file:
                file.write(f"{target}\n")
            return distance(state)

        def torn(descriptor: int, data: bytes) -> int:
            if next(writes) == kill_in_write:
                write(descriptor, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(descriptor, data)

        with mock.patch.object(scores_module.os, "write", torn):
            sweep(ema, GRID, metric, scores=path)

    # At the second call, in the middle of the second line, at the first call, and not at all.
    ends = [forked(lambda k=k: go(*k)) for k in ((1, -1), (-1, 1), (0, -1), (-1, -1))]
    assert ends == [-signal.SIGKILL] * 3 + [0] and next(kills) == 0
    # What was torn had not been finished: it alone is measured again.
    assert log.read_text().split() == ["0.03", "0.05", "0.08", "0.08", "0.13", "0.2"]
    assert [score.target for score in read_scores(path)] == GRID
    assert path.read_bytes().count(b"\n") == len(GRID)


def test_a_killed_sweep_of_folders_leaves_nothing_in_the_way(ema, tmp_path) -> None:
    def metric(place: Path, target: str) -> float:
        if target == "0.08" and not (tmp_path / "again").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return float(target)

    def go() -> list[Any]:
        return sweep(ema, GRID, metric, scores=tmp_path / "s.jsonl", form="folder", scratch=tmp_path / "work")

    assert forked(go) == -signal.SIGKILL
    assert len(read_scores(tmp_path / "s.jsonl")) == 2 and (tmp_path / "work").exists()
    (tmp_path / "again").touch()
    assert [score.score for score in go()] == [float(width) for width in GRID]
    assert not (tmp_path / "work").exists()


def test_a_file_of_scores_that_is_damaged_or_of_something_else_is_refused(folder, ema, distance, tmp_path) -> None:
    path = tmp_path / "scores.jsonl"
    sweep(ema, GRID, distance, scores=path)
    whole = path.read_bytes()
    with pytest.raises(ModelMismatch, match="scores of another run") as caught:
        sweep(folder / "truth", GRID, distance, scores=path)
    assert "--scores" in caught.value.hint
    with pytest.raises(ModelMismatch, match="scores of another metric: expected 'builtins:len'"):
        sweep(ema, GRID, len, scores=path)
    damaged = whole.replace(b'"version"', b'"versiom"', 2).replace(b'"versiom"', b'"version"', 1)
    path.write_bytes(damaged)
    with pytest.raises(StoreError, match=r"scores\.jsonl, line 2"):
        sweep(ema, GRID, distance, scores=path)
    assert path.read_bytes() == damaged
    path.write_bytes(whole[:-20])
    metric = Counted(distance)
    sweep(ema, GRID, metric, scores=path)
    assert [call[0] for call in metric.calls] == ["0.2"] and len(path.read_bytes().splitlines()) == len(GRID)
    with pytest.raises(OrderError, match="lies in the run folder"):
        sweep(ema, GRID, distance, scores=ema / "scores.jsonl")
    with pytest.raises(OutputError, match="cannot be written"):
        sweep(ema, GRID, distance, scores=tmp_path / "missing" / "scores.jsonl")


def test_two_sweeps_at_once_with_one_file_are_refused(ema, tmp_path) -> None:
    def metric(state: State) -> float:
        with pytest.raises(OrderError, match="another sweep is writing it"):
            sweep(ema, ["0.1"], metric, scores=tmp_path / "scores.jsonl")
        return 1.0

    assert len(sweep(ema, ["0.2"], metric, scores=tmp_path / "scores.jsonl")) == 1


def test_a_search_finds_the_width_that_was_tracked_with_few_evaluations(ema, distance, tmp_path) -> None:
    metric, path = Counted(distance), tmp_path / "scores.jsonl"
    found = sweep(ema, "0.02:0.28", metric, scores=path, towards="best", evaluations=12)
    assert 8 <= len(found) == len(metric.calls) <= 12
    assert float(tally(found).best.first.target) == pytest.approx(0.13, rel=0.05)
    assert sweep(ema, "0.02:0.28", metric, scores=path, towards="best", evaluations=12) == found
    assert len(metric.calls) == len(found), "the same points are looked up"
    upside = Counted(lambda state: -distance(state))
    turned = sweep(ema, "0.02:0.28", upside, scores=tmp_path / "up", towards="best", better="higher")
    assert [call[0] for call in upside.calls] == [call[0] for call in metric.calls]
    assert tally(turned, better="higher").best.first.target == tally(found).best.first.target


def test_a_search_gets_to_the_minimum_of_any_parabola_also_under_noise() -> None:
    # Oracle: the parabola itself. The noise has a tenth of its height a factor of 2 from the minimum.
    rng = np.random.default_rng(0)
    for best in (0.03, 0.047, 0.1, 0.19, 0.25):
        for noise, allowed in ((0.0, 1.02), (0.1 * math.log(2) ** 2, 1.5)):
            tried: list[float] = []

            def scores(widths, best=best, noise=noise, tried=tried):
                tried.extend(widths)
                return [math.log(w / best) ** 2 + noise * rng.uniform(-1, 1) for w in widths]

            found = search(scores, 0.02, 0.28, 12)
            assert abs(math.log(found / best)) < math.log(allowed) and found in tried
            assert len(tried) == len(set(tried)) <= 12 and all(0.02 <= width <= 0.28 for width in tried)
    for evaluations in (3, 4, 5, 6, 7, 9):
        tried = []
        search(lambda widths: [tried.extend(widths)] and [abs(w - 0.1) for w in widths], 0.02, 0.28, evaluations)  # noqa: B023
        assert evaluations - 1 <= len(tried) <= evaluations
    for low, high, evaluations in ((0.2, 0.2, 9), (0.3, 0.2, 9), (0.1, 0.2, 2)):
        with pytest.raises(OrderError, match="expected two widths and 3 or more"):
            search(lambda widths: [1.0 for _ in widths], low, high, evaluations)


def test_a_descent_over_groups_gets_to_the_minimum_of_a_sum_of_parabolas() -> None:
    best, tried = (0.05, 0.2, 0.11), []

    def scores(several):
        tried.extend(several)
        return [sum(math.log(w / b) ** 2 for w, b in zip(widths, best, strict=True)) for widths in several]

    found = descend(scores, [0.12] * 3, 0.02, 0.28, 40)
    assert len(tried) == len(set(tried)) <= 40
    assert found == pytest.approx(best, rel=0.02)
    few: list[Any] = []
    descend(lambda several: [few.extend(several)] and [1.0 for _ in several], [0.12] * 3, 0.02, 0.28, 4)
    assert len(few) == 4


def test_a_group_alone_has_the_width_and_all_others_the_base(folder, ema, tmp_path) -> None:
    seen: dict[str, State] = {}

    def metric(state: State, target: str) -> float:
        seen[target] = state
        return distance_to(tensors_of(folder / "tracked" / "0.13"), "attn")(state)

    found = sweep(ema, GRID, metric, scores=tmp_path / "s.jsonl", groups=["attn.*"], base="0.07")
    expected = tensors_of(folder / "tracked" / "0.07")
    for score in found:
        state = seen[score.target]
        torch.testing.assert_close(state["mlp.weight"], expected["mlp.weight"], rtol=0, atol=2e-3)
        assert (score.group, score.base) == ("attn.*", "0.07")
    assert tally(found).best.first.target == "0.13"
    both = sweep(ema, ["0.13"], metric, scores=tmp_path / "s.jsonl", groups=["attn.*", "mlp.*"], base="0.07")
    assert [score.group for score in both] == ["attn.*", "mlp.*"] and len(seen) == len(GRID)
    for groups, text in (
        (["attn.*", "*.q"], "both match attn.q"),
        (["conv.*"], "matches none of 4 averaged"),
        (["*"], "matches all 4 averaged"),
    ):
        with pytest.raises(TargetError, match=text):
            sweep(ema, GRID, metric, scores=tmp_path / "s.jsonl", groups=groups, base="0.07")
    for options in ({"groups": ["attn.*"]}, {"base": "0.1"}):
        with pytest.raises(OrderError, match="groups need a base"):
            sweep(ema, GRID, metric, scores=tmp_path / "s.jsonl", **options)


def test_a_search_over_groups_finds_the_widths_of_each_and_stops_in_time(folder, ema, tmp_path) -> None:
    one, other = (distance_to(tensors_of(folder / "tracked" / w), n) for w, n in (("0.07", "attn"), ("0.13", "mlp")))
    metric, path = Counted(lambda state: one(state) + other(state)), tmp_path / "s.jsonl"
    options = {"towards": "per-tensor", "groups": ["attn.*", "mlp.*"], "base": "0.1", "evaluations": 24}
    found = sweep(ema, "0.03:0.25", metric, scores=path, **options)
    assert len(found) == len(metric.calls) <= 24
    best = tally(found).best.first
    others = json.loads(best.base)
    widths = {best.group: best.target} | others
    assert float(widths["attn.*"]) == pytest.approx(0.07, rel=0.06)
    assert float(widths["mlp.*"]) == pytest.approx(0.13, rel=0.06) and widths["*"] == "0.1"
    assert sweep(ema, "0.03:0.25", metric, scores=path, **options) == found and len(metric.calls) == len(found)


def test_times_repeats_and_a_second_parameter_make_a_grid_of_which_weights_are_rebuilt_once(ema, tmp_path) -> None:
    def metric(state: State, repeat: int, target: str, t: float, guidance: float) -> float:
        return float(target) + 10 * guidance + 100 * repeat + t

    rebuilt, real = [], states.plan_rebuild

    def planned(run: Any, outputs: Any, **options: Any) -> Any:
        rebuilt.extend(outputs)
        return real(run, outputs, **options)

    options = {"times": [200, 400], "repeats": 3, "second": {"guidance": [1.0, 2.0]}}
    with mock.patch.object(states, "plan_rebuild", planned):
        found = sweep(ema, ["0.1", "0.2"], metric, scores=tmp_path / "s.jsonl", **options)
    assert len(rebuilt) == 4 and len(found) == 2 * 2 * 3 * 2
    for score in found:
        assert score.score == float(score.target) + 10 * score.second.value + 100 * score.repeat + score.t
    curves = curves_of(tally(found))
    assert [(curve.first.t, curve.first.second.value) for curve in curves] == [
        (t, value) for t in (200, 400) for value in (1.0, 2.0)
    ]
    entry = curves[0].entries[0]
    assert (entry.mean, entry.least, entry.most) == (pytest.approx(310.1), 210.1, 410.1)
    with pytest.raises(TargetError, match="names a time of its own"):
        sweep(ema, ["0.1@t=100"], metric, scores=tmp_path / "s.jsonl", **options)


def test_the_best_length_at_several_times_is_searched_for_each(ema, tmp_path) -> None:
    # Oracle: a metric that knows where its minimum lies, which moves with time.
    def metric(state: State, target: str, t: float) -> float:
        return math.log(float(target) / (0.05 + 0.1 * t / STEPS)) ** 2

    found = sweep(ema, "0.02:0.28", metric, scores=tmp_path / "s.jsonl", towards="best", times="count=2")
    best = {curve.first.t: float(curve.best.first.target) for curve in curves_of(tally(found))}
    assert best == {200.0: pytest.approx(0.10, rel=0.02), 400.0: pytest.approx(0.15, rel=0.02)}


SCRIPT = """
import json, os, sys
assert "RANK" not in os.environ and "WORLD_SIZE" not in os.environ, "it is no process of torchrun"
folder, target, t, value, repeat, rank = sys.argv[1:]
recipe = json.load(open(f"{folder}/phema.json"))
assert recipe["target"] == f"{target}@t={t}" and rank == "0"
print("a line of progress")
if target == "0.2" and value == "3":
    sys.exit("out of memory")
print(json.dumps({"score": float(target) * float(value), "loss": 1}) if repeat == "0" else float(target))
"""


def test_a_command_is_given_a_folder_and_prints_the_score_last(ema, tmp_path, monkeypatch) -> None:
    (tmp_path / "my eval.py").write_text(SCRIPT)
    monkeypatch.setenv("RANK", "0")
    words = [sys.executable, "-IS", str(tmp_path / "my eval.py")]
    command = Command(f"{shlex.join(words)} {{dir}} {{target}} {{t}} {{value}} {{repeat}} {{rank}}")
    options = {"scores": tmp_path / "s.jsonl", "repeats": 2}
    found = sweep(ema, ["0.1"], command, second="w=2", **options)
    assert [score.score for score in found] == [0.2, 0.1] and found[0].metric == command.text
    with pytest.raises(PhemaError, match="ended with exit code 1: out of memory") as caught:
        sweep(ema, ["0.1", "0.2"], command, second="w=2,3", **options)
    assert "goes on where it stopped" in caught.value.hint
    assert len(read_scores(tmp_path / "s.jsonl")) == 2 + 2, "what came before the failure is kept"
    for text, error in (
        ("true {dir}", "found ''"),
        ("echo {dir}", "expected a number or JSON"),
        ("./no {dir}", "be started"),
    ):
        with pytest.raises(PhemaError, match=error):
            sweep(ema, ["0.1"], Command(text), scores=tmp_path / f"{len(text)}-{text[0]}")
    for text in ("eval.py", "eval.py '{dir}"):
        with pytest.raises(OrderError):
            Command(text)
    with pytest.raises(OrderError, match="without a second parameter"):
        sweep(ema, ["0.1"], command, **options)


@pytest.mark.parametrize(
    ("gives", "text"),
    [(None, "expected a number, found None"), (True, "found True"), ("1", "found '1'"), (math.nan, "a finite number")],
)
def test_what_is_no_score_is_refused_and_not_kept(ema, tmp_path, gives, text) -> None:
    with pytest.raises(PhemaError, match=text):
        sweep(ema, ["0.1"], lambda state: gives, scores=tmp_path / "s.jsonl")
    assert read_scores(tmp_path / "s.jsonl") == ()
    kinds = {"0.1": np.float32(0.5), "0.2": torch.tensor(2.0)}
    found = sweep(ema, [*kinds], lambda state, target: kinds[target], scores=tmp_path / "s.jsonl")
    assert [score.score for score in found] == [0.5, 2.0]


def test_what_a_metric_raises_passes_through_after_the_others_were_kept(ema, tmp_path) -> None:
    def metric(state: State, target: str) -> float:
        return 1 / (float(target) - 0.08)

    with pytest.raises(ZeroDivisionError):
        sweep(ema, GRID, metric, scores=tmp_path / "s.jsonl")
    assert [score.target for score in read_scores(tmp_path / "s.jsonl")] == ["0.03", "0.05"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"form": "tensor"}, "form: expected one of state_dict, folder, model"),
        ({"form": "model"}, "a live model go together"),
        ({"model": nn.Linear(1, 1)}, "a live model go together"),
        ({"like": "dir"}, "only folders have files beside them"),
        ({"dtype": "bfloat16"}, "only folders have one"),
        ({"repeats": 0}, "repeats: expected 1 or more"),
        ({"better": "best"}, "better: expected one of lower, higher"),
        ({"memory": "much"}, "expected a size such as 5GB"),
        ({"towards": "best"}, "expected two widths or more to search between, found '0.1'"),
        ({"towards": "per-tensor"}, "needs groups of parameters"),
        ({"metric": "nowhere:fid"}, "there is no module nowhere"),
        ({"metric": "json:fid"}, "has no attribute 'fid'"),
        ({"metric": "json"}, "expected MODULE:FUNCTION"),
        ({"metric": 3}, "expected a function, found 3"),
        ({"metric": lambda state: 1.0, "second": "w=1"}, "has no argument 'w'"),
        ({"metric": Command("eval {dir}"), "form": "state_dict"}, "a command is given a folder"),
    ],
)
def test_options_that_will_not_do_are_refused_before_anything_is_made(ema, tmp_path, options, text) -> None:
    with pytest.raises(PhemaError, match=text):
        sweep(ema, ["0.1"], **({"metric": len, "scores": tmp_path / "s.jsonl"} | options))
    assert not [*tmp_path.iterdir()]


def own_bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of this rank's own pieces of everything."""
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: (t.to_local() if isinstance(t, DTensor) else t).detach().clone() for name, t in held.items()}


def live_body(root: Path, truth: State) -> dict[str, Any]:
    """Scores of a live model and of dictionaries on two ranks, and what failures leave behind."""
    rank = torch.distributed.get_rank()
    model = Walker()
    fully_shard(model.mlp)
    fully_shard(model)
    with torch.no_grad():
        for param in model.parameters():
            assert isinstance(param, DTensor)
            param.to_local().uniform_(-1, 1)
    before, calls = own_bits(model), []

    def whole(live: nn.Module) -> float | None:
        calls.append("model")
        held = gathered(live)
        with torch.no_grad():
            live.mlp(torch.ones(1, 20))  # leaves it gathered
        assert not isinstance(live.mlp.weight, DTensor)
        score = distance_to({name: truth[name] for name in held if name != "still"})(held)
        assert int(live.count) == STEPS and held["still"].tolist() == [0, 1, 2]
        return score if rank == 0 else None

    found = {"model": sweep(root / "ema", GRID, whole, scores=root / "live", form="model", model=model)}
    unchanged = [own_bits(model)]

    def fails(live: nn.Module) -> float:
        if rank == 1:
            raise ZeroDivisionError("on one rank")
        return 1.0

    with pytest.raises(PhemaError if rank == 0 else ZeroDivisionError, match="on one rank"):
        sweep(root / "ema", GRID, fails, scores=root / "fails", form="model", model=model)
    unchanged.append(own_bits(model))
    assert all(isinstance(param, DTensor) for param in model.parameters())
    assert read_scores(root / "fails") == ()
    assert all(same_bits(bits[name], before[name]) for bits in unchanged for name in before)

    def alone(state: State) -> float:
        calls.append("state")
        return distance_to({name: value for name, value in truth.items() if name not in ("still", "count")})(state)

    def placed(place: Path) -> float:
        calls.append("folder")
        return alone(tensors_of(place))

    found["state"] = sweep(root / "ema", GRID, alone, scores=root / "states")
    found["folder"] = sweep(root / "ema", GRID, placed, scores=root / "folders", form="folder")
    found["best"] = sweep(root / "ema", "0.02:0.28", alone, scores=root / "states", towards="best")
    found["calls"] = calls
    return found


def test_two_ranks_measure_a_live_sharded_model_together_and_share_out_all_else(folder, tmp_path) -> None:
    (tmp_path / "ema").symlink_to(folder / "ema")
    truth = tensors_of(folder / "tracked" / "0.13")
    one, other = run_ranks(2, live_body, tmp_path, truth)
    for key in ("model", "state", "folder", "best"):
        assert one[key] == other[key]
    for a, b, c in zip(one["model"], one["state"], one["folder"], strict=True):
        # Which stored averages are read depends on what is rebuilt at once, within the tolerance of 1e-3.
        assert (a.target, a.t) == (b.target, b.t) and a.score == pytest.approx(b.score, rel=0.02, abs=1e-3)
        assert b.score == pytest.approx(c.score, rel=0.02, abs=1e-3)
    assert tally(one["model"]).best.first.target == "0.13"
    assert float(tally(one["best"]).best.first.target) == pytest.approx(0.13, rel=0.05)
    for calls in (one["calls"], other["calls"]):
        assert calls.count("model") == 5 and calls.count("folder") in (2, 3)
    assert sum(calls.count("folder") for calls in (one["calls"], other["calls"])) == 5
    assert [score.target for score in read_scores(tmp_path / "live")] == GRID


METRIC = """
import math

def bowl(state, target, repeat=0):
    assert set(state) == {"attn.q", "attn.k", "mlp.weight", "mlp.bias", "still", "count"}
    return math.log(float(target) / 0.1) ** 2 + repeat / 100

def slope(state, target):
    return float(target)
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "measures_of_mine.py").write_text(METRIC)
    yield tmp_path
    sys.modules.pop("measures_of_mine", None)


def test_the_command_says_which_is_best_and_how_to_rebuild_it(ema, here) -> None:
    words = ("sweep", ema, "--targets", "0.05:0.15:0.05", "--metric", "measures_of_mine:bowl", "--repeats", 2)
    done = run(*words, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    (curve,) = found["curves"]
    assert [score["target"] for score in curve["scores"]] == ["0.05", "0.1", "0.15"]
    assert [score["max"] - score["min"] for score in curve["scores"]] == pytest.approx([0.01] * 3)
    assert found["best"]["target"] == curve["best"] == "0.1" and found["notes"] == [] and not curve["open"]
    assert len(read_scores(here / "scores.jsonl")) == 6
    table = run(*words).stdout
    assert "best of all" in table and "min – max" in table and "forecast error" in table
    assert found["rebuild"] == table.strip().splitlines()[-1:]
    again = run(*shlex.split(found["rebuild"][0])[1:])
    assert again.returncode == 0, again.stderr
    assert json.loads((here / "best" / "0.1-t-400" / "phema.json").read_text())["target"] == "0.1@t=400"


def test_the_command_hints_where_the_best_is_at_the_edge_and_tells_what_a_search_over_groups_costs(ema, here) -> None:
    edge = run("sweep", ema, "--targets", "0.05,0.1", "--metric", "measures_of_mine.py:slope", "--scores", "edge")
    assert edge.returncode == 0
    assert "note: the best width at steps 400, 0.05, is at the edge of those tried, 0.05 to 0.1" in edge.stdout
    assert "a better one may lie below; widen --targets" in edge.stdout
    words = ("--group", "attn.*", "--group", "mlp.*", "--base", 0.12, "--per-tensor-search", "--evaluations", 7)
    done = run("sweep", ema, "--metric", "measures_of_mine:slope", "--scores", "groups", *words)
    assert done.returncode == 0
    assert "2 groups take up to 6 evaluations a round after the first; it stops at 7" in done.stderr
    assert "note:" not in done.stdout and "--per-tensor best.json" in done.stdout
    assert len(read_scores(here / "groups")) <= 7
    for given in ([], ["--metric", "a:b", "--command", "c {dir}"]):
        refused = run("sweep", ema, *given)
        assert refused.returncode == 1 and "one metric or command" in refused.stderr
