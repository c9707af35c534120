"""Averages of a user's own, saved by ``dcp.save`` into a run folder: an ordinary snapshot, or nothing and why."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from builders import (
    Division,
    Free,
    divided_models,
    examples,
    listing,
    no_flush,
    numbers,
    same_bits,
    shard,
    tensors_of,
    unclaimed,
)
from hypothesis import given
from models import Trainer, make_model
from models import shard as sharded
from ranks import run_ranks
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sharded_phema.errors import ModelMismatch, OrderError, PhemaError, StoreError, TargetError, UnsupportedModel
from sharded_phema.layout import tally, whole
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct
from sharded_phema.store import BoxTensor, Run, open_run
from sharded_phema.store.dcp_reader import SnapshotReader
from sharded_phema.store.dcp_writer import SnapshotWriter
from sharded_phema.store.shares import Piece, share_out
from sharded_phema.verify import verify

WIDTHS = ("0.05", "power:gamma=6")
State = dict[str, dict[str, torch.Tensor]]


@contextmanager
def alone() -> Iterator[None]:
    """torch warns that one process saves alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        yield


def save(state: Any, root: Path, t: float, **options: Any) -> None:
    """Save, and raise what the first failing rank raised."""
    planner = options.pop("planner", None)
    with alone():
        try:
            dcp.save(state, storage_writer=SnapshotWriter(root, t, start=1, **options), planner=planner)
        except CheckpointException as wrapped:
            raise next(iter(wrapped.failures.values()))[0] from None


def state_of(seed: int, labels: tuple[Any, ...] = WIDTHS) -> State:
    """A matrix, a vector, a scalar and nothing, for each label."""
    torch.manual_seed(seed)
    shapes = {"layer.weight": (3, 4), "layer.bias": (4,), "scale": (), "none": (2, 0)}
    return {label: {name: torch.randn(shape) for name, shape in shapes.items()} for label in labels}


def read(run: Run, index: int, state: State) -> State:
    """What a snapshot holds, read by ``dcp.load`` into tensors like some."""
    labels = dict(zip(state, run.record.averages, strict=True))
    found = {labels[a]: {name: torch.full_like(x, math.nan) for name, x in state[a].items()} for a in state}
    with alone():
        dcp.load(found, storage_reader=SnapshotReader(run.snapshots[index]))
    return found


def assert_same(found: State, expected: State) -> None:
    for mine, theirs in zip(found.values(), expected.values(), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(same_bits(mine[name], theirs[name]) for name in mine)


def test_what_one_process_saves_is_a_run_like_any_other(tmp_path: Path) -> None:
    states = [state_of(seed) for seed in range(3)]
    for index, state in enumerate(states):
        save(state, tmp_path / "ema", 10.0 * (index + 1))
    run = open_run(tmp_path / "ema")
    assert [s.t for s in run.snapshots] == [10.0, 20.0, 30.0] and not (run.abandoned or run.unfinished or run.damaged)
    assert run.snapshots[0].start == 1.0 and len(run.record.averages) == 2
    assert verify(tmp_path / "ema").intact
    assert not [*(tmp_path / "ema").glob("claims/*")], "the run is given up again"
    assert len([*(tmp_path / "ema").glob("layouts/*")]) == 1, "sessions that are cut alike share a layout"
    for index, state in enumerate(states):
        assert_same(read(run, index, state), state)
        flat = [torch.cat([x.double().reshape(-1) for x in state[label].values()]) for label in WIDTHS]
        assert run.snapshots[index].norms == pytest.approx([float(x @ x) for x in flat], rel=1e-12)
        assert run.snapshots[index].gaps == pytest.approx([float((flat[0] - flat[1]).square().sum())], rel=1e-12)
    reconstruct(tmp_path / "ema", [*WIDTHS], out=tmp_path / "out", tolerance="exact")
    for label, folder in zip(WIDTHS, ("0.05", "power-gamma-6"), strict=True):
        found = tensors_of(tmp_path / "out" / folder)
        assert found.keys() == states[-1][label].keys()
        assert all(same_bits(found[name], x) for name, x in states[-1][label].items())


def test_labels_and_numbers_are_spelled_as_the_rest_of_the_package_spells_them(tmp_path: Path) -> None:
    state = state_of(1, (0.05, "uniform", "exponential:halflife=100,ramp=0.05"))
    save(state, tmp_path / "ours", 10)
    with PostHocEMA(Free(w=2), tmp_path / "theirs", profiles=list(state)):
        pass
    assert open_run(tmp_path / "ours").record.averages == open_run(tmp_path / "theirs").record.averages
    # Another spelling and another order are the same run.
    other = {label: dict(reversed(tensors.items())) for label, tensors in reversed(state.items())}
    other["power:gamma=0"] = other.pop("uniform")
    save(other, tmp_path / "ours", 20)
    first, second = open_run(tmp_path / "ours").snapshots
    for average in range(3):
        for parameter in range(4):
            box = whole(first.record.parameters[parameter].shape)
            one, two = (s.read_box(average, parameter, box) for s in (first, second))
            np.testing.assert_array_equal(one, two, strict=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_averages_of_any_real_dtype_are_rounded_to_that_of_the_run(tmp_path: Path, dtype: str) -> None:
    state = {"0.05": {"a": torch.randn(5, dtype=torch.float64), "b": torch.randn(5).bfloat16()}}
    save(state, tmp_path / "ema", 10, dtype=dtype)
    wide = {"0.05": {name: torch.empty(5) for name in "ab"}}
    expected = {name: x.to(getattr(torch, dtype)).float() for name, x in state["0.05"].items()}
    assert_same(read(open_run(tmp_path / "ema"), 0, wide), {"0.05": expected})


def test_strided_tensors_and_boxes_are_stored_as_what_they_mean(tmp_path: Path) -> None:
    array = numbers([(4, 3)], 1)[0]
    boxes = BoxTensor.of(shard("boxes", array, (whole((2, 3)), *_lower(array))))
    save({"0.05": {"boxes": boxes, "strided": torch.from_numpy(array).T}}, tmp_path / "ema", 10)
    plain = {"0.05": {"boxes": torch.empty(4, 3), "strided": torch.empty(3, 4)}}
    expected = {"0.05": {"boxes": torch.from_numpy(array), "strided": torch.from_numpy(array.T.copy())}}
    assert_same(read(open_run(tmp_path / "ema"), 0, plain), expected)


def _lower(array: np.ndarray) -> tuple:
    from sharded_phema.layout import Box

    return (Box((2, 0), (2, 3)),)


def refused(state: Any, **options: Any) -> Callable[[Path], None]:
    return lambda root: save(state, root, options.pop("t", 20.0), **options)


ONE = state_of(1)
REFUSALS: dict[str, tuple[Callable[[Path], None], type[PhemaError], str]] = {
    "a number": (refused({"0.05": {"w": 3}}), StoreError, "0.05.w: no tensor"),
    "a step beside": (refused(ONE | {"step": 7}), StoreError, "step: no tensor"),
    "no label": (refused({"w": torch.zeros(2)}), StoreError, "w: no tensor that has a label and a name"),
    "a list": (refused({"0.05": [torch.zeros(2)]}), StoreError, "no tensor that has a label and a name"),
    "whole numbers": (refused({"0.05": {"w": torch.zeros(2).int()}}), StoreError, "torch.int32 is no average"),
    "complex": (refused({"0.05": {"w": torch.zeros(2) + 1j}}), StoreError, "complex64 is no average"),
    "no averages": (refused({}), TargetError, "no "),
    "no profile": (refused({"ema": ONE["0.05"]}), TargetError, "ema"),
    "a window": (refused({"window:0.2": ONE["0.05"]}), TargetError, "cannot be tracked"),
    "one twice": (refused({"0.05": ONE["0.05"], "0.050": ONE["0.05"]}), TargetError, "twice"),
    "a tensor less": (refused(ONE | {"0.1": {"scale": torch.tensor(1.0)}}), ModelMismatch, "same parameters"),
    "other shapes": (refused({"0.05": {"w": torch.zeros(2)}, "0.1": {"w": torch.zeros(3)}}), ModelMismatch, "one sh"),
    "a planner of no labels": (
        refused({"0.05.w": torch.zeros(2)}, planner=dcp.DefaultSavePlanner(flatten_state_dict=False)),
        StoreError,
        "tells no labels",
    ),
    "another model": (refused({a: {"w": torch.zeros(2)} for a in WIDTHS}), ModelMismatch, "with other parameters"),
    "other averages": (refused({"0.1": ONE["0.05"]}), ModelMismatch, "with other averages"),
    "another unit": (refused(ONE, unit="tokens"), ModelMismatch, "with other unit"),
    "another dtype": (refused(ONE, dtype="float16"), ModelMismatch, "with other dtype"),
    "the same time": (refused(ONE, t=10.0), OrderError, "the run holds one at 10"),
    "an earlier time": (refused(ONE, t=9.0), OrderError, "the run holds one at 10"),
    "a time that is there": (refused(ONE, t=5.0, resumed_at=5.0), OrderError, "the run holds one at 5"),
    "no name of a unit": (refused(ONE, unit=" "), TargetError, "unit"),
    "a gap": (refused({a: {"w": BoxTensor((2,), {torch.Size((0,)): torch.zeros(1)}, torch.zeros(1))} for a in WIDTHS}),
              UnsupportedModel, "not each of the 2 elements"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_wrong_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    for t in (5.0, 10.0):
        save(ONE, tmp_path, t)
    before = listing(tmp_path)
    act, kind, message = REFUSALS[case]
    with pytest.raises((kind, Exception) if case == "a gap" else kind, match=message) as caught:
        act(tmp_path)
    assert listing(tmp_path) == before
    if isinstance(caught.value, PhemaError):
        assert caught.value.hint
    if case not in ("another model", "other averages", "another unit", "another dtype") and "time" not in case:
        with pytest.raises(Exception, match=message):
            act(tmp_path / "new")
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options", [{"t": -1}, {"t": math.nan}, {"start": 11}, {"start": "1"}, {"resumed_at": 11}, {"dtype": "float8"}]
)
def test_impossible_times_and_dtypes_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TargetError):
        SnapshotWriter(tmp_path, **({"t": 10, "start": 1} | options))


def test_going_back_leaves_later_snapshots_behind_and_overwrites_nothing(tmp_path: Path) -> None:
    for t in (10, 20, 30):
        save(state_of(t), tmp_path, t)
    save(state_of(1), tmp_path, 20, resumed_at=15)
    save(state_of(2), tmp_path, 25)
    run = open_run(tmp_path)
    assert [s.t for s in run.snapshots] == [10.0, 20.0, 25.0] and sorted(s.t for s in run.abandoned) == [20.0, 30.0]
    for index, seed in enumerate((10, 1, 2)):
        assert_same(read(run, index, state_of(seed)), state_of(seed))


def test_a_run_that_was_begun_otherwise_is_continued_either_way(tmp_path: Path) -> None:
    model = Free(w=4, v=(2, 3))
    with PostHocEMA(model, tmp_path, sigma_rels=(0.05, 0.1), snapshot_every=5) as ema:
        for _ in range(10):
            model.set(w=torch.randn(4))
            ema.update()
        state = {label: x for label, x in ema.state_dict().items() if label != "clock"}
    save({label: {name: x + 1 for name, x in tensors.items()} for label, tensors in state.items()}, tmp_path, 20)
    run = open_run(tmp_path)
    assert [s.t for s in run.snapshots] == [5.0, 10.0, 20.0]
    with PostHocEMA(model, tmp_path, sigma_rels=(0.05, 0.1), snapshot_every=5) as ema:
        assert ema.resume() == 20.0
        for label, tensors in state.items():
            assert all(same_bits(ema.state_dict()[label][name], x + 1) for name, x in tensors.items())
        ema.update(25)
    assert [s.t for s in open_run(tmp_path).snapshots] == [5.0, 10.0, 20.0, 25.0]


def test_a_run_with_copied_tensors_is_refused(tmp_path: Path) -> None:
    model = Free(w=4)
    model.register_buffer("count", torch.tensor(1))
    with PostHocEMA(model, tmp_path, sigma_rels=(0.05,)) as ema:
        ema.update()
    with pytest.raises(ModelMismatch, match="with other copied tensors"):
        save({"0.05": {"w": torch.zeros(4)}}, tmp_path, 20)


def test_the_run_of_a_living_process_is_refused_and_one_of_this_process_is_taken_over(tmp_path: Path) -> None:
    code = f"""
        import sys
        from torch import nn
        from sharded_phema import PostHocEMA
        ema = PostHocEMA(nn.Linear(2, 2), {str(tmp_path / "other")!r}, sigma_rels=(0.05,))
        ema.update()
        ema.snapshot()
        print("ready", flush=True)
        sys.stdin.read()
    """
    linear = {"0.05": {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}}
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        before = listing(tmp_path)
        with pytest.raises(OrderError, match=f"process {other.pid} on .* is training into this folder"):
            save(linear, tmp_path / "other", 20)
        assert listing(tmp_path) == before
        other.communicate()
    model = Free(w=4)
    ema = PostHocEMA(model, tmp_path / "own", sigma_rels=(0.05,))
    ema.update()
    ema.snapshot()
    save({"0.05": {"w": torch.zeros(4)}}, tmp_path / "own", 20)
    ema.update()
    with pytest.raises(OrderError, match="another process goes on with this run"):
        ema.snapshot()
    assert [s.t for s in open_run(tmp_path / "own").snapshots] == [1.0, 20.0]


def test_a_number_too_large_for_the_dtype_leaves_no_snapshot_and_the_next_one_works(tmp_path: Path) -> None:
    fine, huge = ({"0.05": {"w": torch.full((3,), value)}} for value in (1.0, 1e6))
    save(fine, tmp_path, 10, dtype="float16")
    before = unclaimed(listing(tmp_path))
    with pytest.raises(StoreError, match="does not fit float16"):
        save(huge, tmp_path, 20, dtype="float16")
    assert not [*tmp_path.glob("claims/*")]
    assert {name: data for name, data in listing(tmp_path).items() if data} == {n: d for n, d in before.items() if d}
    save(fine, tmp_path, 20, dtype="float16")
    assert [s.t for s in open_run(tmp_path).snapshots] == [10.0, 20.0] and verify(tmp_path).intact


def test_a_writer_is_of_one_folder_and_needs_ranks_that_talk(tmp_path: Path) -> None:
    with alone(), pytest.raises(StoreError, match="cannot save elsewhere"):
        dcp.save({}, checkpoint_id="elsewhere", storage_writer=SnapshotWriter(tmp_path, 10, start=1))
    with alone(), pytest.raises(StoreError, match="know nothing of each other"):
        dcp.save(ONE, storage_writer=SnapshotWriter(tmp_path, 10, start=1), use_collectives=False)
    assert not [*tmp_path.iterdir()]


def test_plans_that_a_planner_keeps_are_refused_when_they_are_left_out(tmp_path: Path) -> None:
    try:
        save(ONE, tmp_path, 10, planner=dcp.DefaultSavePlanner(enable_plan_caching=True))
        with pytest.raises(StoreError, match="left out because it was seen"):
            save(ONE, tmp_path, 20, planner=dcp.DefaultSavePlanner(enable_plan_caching=True))
    finally:
        for kept in ("_cached_save_plan", "_cached_all_plans", "_cached_global_plan", "_cached_metadata"):
            getattr(dcp.SavePlanner, kept).clear()
    assert [s.t for s in open_run(tmp_path).snapshots] == [10.0]


# Several ranks ---------------------------------------------------------------------------------------------------


def trained_body(root: str) -> None:
    """The averages of our own run, and the same ones saved by dcp.save."""
    model = sharded(make_model())
    trainer = Trainer(model)
    folder = Path(root)
    with PostHocEMA(model, folder / "ours", sigma_rels=(0.05, 0.1), snapshot_every=2) as ema:
        for step in range(1, 7):
            trainer.step()
            ema.update()
            if step % 2 == 0:
                state = {label: tensors for label, tensors in ema.state_dict().items() if label != "clock"}
                dcp.save(state, storage_writer=SnapshotWriter(folder / "theirs", ema.t, start=1))
    # FSDP2's own DTensors, and a tensor that each rank has whole.
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parameters = dict(model.named_parameters())
    parameters |= {"plain": torch.arange(6.0), "copies": distribute_tensor(torch.ones(5, 2), mesh, [Replicate()])}
    parameters["columns"] = distribute_tensor(torch.arange(15.0).view(3, 5), mesh, [Shard(1)])
    state = {label: parameters for label in ("0.05", "0.1", "uniform")}
    dcp.save(state, storage_writer=SnapshotWriter(folder / "dtensors", 10, start=1))
    run = open_run(folder / "dtensors")
    found = {a: {name: torch.zeros_like(x.detach()) for name, x in parameters.items()} for a in run.record.averages}
    dcp.load(found, storage_reader=SnapshotReader(run.snapshots[0]))
    for tensors in found.values():
        for name, expected in parameters.items():
            assert same_bits(_local(tensors[name]), _local(expected)), name
    half = partial(SnapshotWriter, folder / "half", 10, start=1, dtype="float16")
    # What only one rank finds out while it writes; the next save works.
    for value in (1e6, 1.0):
        tensor = distribute_tensor(torch.tensor([1.0, value]), mesh, [Shard(0)])
        try:
            dcp.save({"0.05": {"w": tensor}}, storage_writer=half())
        except CheckpointException as error:
            assert value == 1e6 and "does not fit float16" in str(error) and [*error.failures] == [1]
    for bad in ({"0.05": {"w": torch.zeros(2)}, "step": 3}, {"0.05": {"w": torch.zeros(2)}}):
        with pytest.raises(CheckpointException):
            dcp.save(bad, storage_writer=SnapshotWriter(folder / "dtensors", 20, start=1))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def test_dtensors_of_two_ranks_are_stored_by_who_holds_them_and_replicas_once(tmp_path: Path) -> None:
    run_ranks(2, trained_body, str(tmp_path))
    for name in ("ours", "theirs"):
        reconstruct(tmp_path / name, ["0.05", "0.07"], out=tmp_path / "out" / name, tolerance="exact")
    ours, theirs = (tensors_of(tmp_path / "out" / name / "0.05") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and all(same_bits(ours[key], theirs[key]) for key in ours)
    ours, theirs = (tensors_of(tmp_path / "out" / name / "0.07") for name in ("ours", "theirs"))
    assert all(same_bits(ours[key], theirs[key]) for key in ours)
    for name in ("theirs", "dtensors", "half"):
        run = open_run(tmp_path / name)
        assert verify(tmp_path / name).intact and not run.unfinished
        parts = run.snapshots[-1].facts.parts
        assert len(parts) == 2 and all(part.size for part in parts)
        stored = [x for path in Path(run.snapshots[-1].where).glob("*.safetensors") for x in _numels(path)]
        assert sum(stored) == run.numel * len(run.record.averages), "each element once"
    found = tensors_of(reconstructed(tmp_path / "dtensors", tmp_path / "whole"))
    assert found["plain"].equal(torch.arange(6.0)) and found["copies"].equal(torch.ones(5, 2))
    assert found["columns"].equal(torch.arange(15.0).view(3, 5))


def reconstructed(root: Path, out: Path) -> Path:
    reconstruct(root, ["0.05"], out=out, tolerance="exact")
    return out / "0.05"


def _numels(path: Path) -> list[int]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return [file.get_tensor(key).numel() for key in file.keys()]  # noqa: SIM118 (not a mapping)


def piece(average: str, name: str, shape: tuple[int, ...], box: Any) -> Piece:
    return Piece(
        average, name, shape, box, WriteItem(MetadataIndex(name, torch.Size(box.offsets)), WriteItemType.SHARD)
    )


@examples(80)
@given(divided_models())
def test_however_a_model_is_cut_its_elements_are_shared_out_once_and_alike_in_all_averages(division: Division) -> None:
    # Oracle: tallies of elements; and a piece is only given to a rank that holds it.
    held = [
        [
            piece(average, p.name, p.shape, box)
            for average in WIDTHS
            for p, ranks in zip(division.parameters, division.held, strict=True)
            for box in ranks[rank][0]
        ]
        for rank in range(division.ranks)
    ]
    shares = share_out(held)
    assert shares.averages == WIDTHS[: len(shares.averages)]
    for rank, share in enumerate(shares.ranks):
        assert {*share} <= {*held[rank]}
        by_average = [[(x.name, x.box) for x in share if x.average == average] for average in WIDTHS]
        assert by_average[0] == by_average[1]
        boxes = shares.boxes(rank) if share else {}
        assert [(name, box) for name, found in boxes.items() for box in found] == by_average[0]
    for p in shares.parameters:
        boxes = [x.box for share in shares.ranks for x in share if (x.average, x.name) == (WIDTHS[0], p.name)]
        assert tally(boxes) == tally([whole(p.shape)]) and sum(box.numel for box in boxes) == math.prod(p.shape)


def test_replicas_are_written_by_the_rank_that_has_least_to_write() -> None:
    box = whole((5,))
    held = [[piece("0.05", f"w{i}", (5,), box) for i in range(8)] for _ in range(4)]
    assert [len(share) for share in share_out(held).ranks] == [2, 2, 2, 2]


def test_averages_that_are_cut_differently_are_refused() -> None:
    top, bottom, both = (*_lower(np.zeros(0)),), whole((2, 3)), whole((4, 3))
    held = [[piece("0.05", "w", (4, 3), both)], [piece("0.1", "w", (4, 3), both)]]
    with pytest.raises(UnsupportedModel, match="no rank holds the same part of it in all"):
        share_out(held)
    held = [[piece("0.05", "w", (4, 3), box) for box in (*top, bottom)], [piece("0.1", "w", (4, 3), both)]]
    with pytest.raises(UnsupportedModel, match="24 elements in 3 boxes"):
        share_out(held)


def test_a_killed_save_leaves_nothing_that_is_read_and_the_next_one_removes_it(tmp_path: Path) -> None:
    code = f"""
        import os, torch, torch.distributed.checkpoint as dcp
        from sharded_phema.store import dcp_writer
        dcp_writer.commit_snapshot = lambda *args: os._exit(9)
        writer = dcp_writer.SnapshotWriter({str(tmp_path)!r}, 10, start=1)
        dcp.save({{"0.05": {{"w": torch.ones(3)}}}}, storage_writer=writer)
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == 9
    run = open_run(tmp_path)
    assert not run.snapshots and len(run.unfinished) == 1
    save({"0.05": {"w": torch.ones(3)}}, tmp_path, 10)
    run = open_run(tmp_path)
    assert [s.t for s in run.snapshots] == [10.0] and not run.unfinished and verify(tmp_path).intact


def test_nothing_is_flushed_twice_and_a_folder_in_memory_will_do() -> None:
    with tempfile.TemporaryDirectory() as folder, no_flush():
        save(ONE, Path(folder), 10)
    save(ONE, "memory://dcp-writer/ema", 10)  # type: ignore[arg-type]
    assert_same(read(open_run("memory://dcp-writer/ema"), 0, ONE), ONE)
