"""Whole models: what is not averaged is copied into snapshots or stored once, and is rebuilt with the rest."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from builders import (
    LABELS,
    divided_models,
    divisions,
    examples,
    listing,
    no_flush,
    rows_of,
    same_bits,
    shapes,
    tensors_of,
)
from crowd import Crowd
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sharded_phema import frozen as frozen_module
from sharded_phema import grid
from sharded_phema import session as session_module
from sharded_phema.background import Foreground
from sharded_phema.errors import ModelMismatch, OutputError, StoreError, UnsupportedModel
from sharded_phema.folder import open_folder
from sharded_phema.identity import run_record
from sharded_phema.layout import Box, ParamShard, ShardLayout, whole
from sharded_phema.manifest import SessionRecord
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct
from sharded_phema.session import Session
from sharded_phema.staging import alive
from sharded_phema.state import Clock
from sharded_phema.store import frozen as store_frozen
from sharded_phema.store import names, open_run, write_part
from sharded_phema.store.records import write_record
from sharded_phema.tensorfile import CODES, torch_dtype
from sharded_phema.transcript import decode, encode

# Torch says so of every save and load outside a process group.
pytestmark = pytest.mark.filterwarnings("ignore:.*single process")

DTYPES = [torch_dtype(name) for name in CODES if hasattr(torch, name)]


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with no_flush():
        yield


def forbidden(*args, **options):
    raise AssertionError("this must not be called")


# A model of tensors that are not averaged, cut over fake ranks.


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits, NaN and infinities included."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    if dtype == torch.bool:
        return (torch.rand(shape, generator=generator) < 0.5).reshape(shape)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


@dataclass(frozen=True)
class Cut:
    """One tensor's share of each rank: boxes and replica numbers."""

    name: str
    kind: str
    held: list[tuple[tuple[Box, ...], int]]

    def shard(self, rank: int, tensor: Tensor) -> ParamShard:
        boxes, replica = self.held[rank]
        local = torch.cat([tensor.new_empty(0), *(tensor[box.slices].reshape(-1) for box in boxes)])
        return ParamShard(
            self.name, tuple(tensor.shape), boxes, local, lambda: local, self.kind, replica, len(self.held)
        )


@dataclass(frozen=True)
class Fake:
    """What each rank of one session holds: averaged parameters (not looked at here), copied and frozen tensors."""

    averaged: list[ShardLayout]
    copied: list[ShardLayout]
    frozen: list[ShardLayout]

    @property
    def ranks(self) -> int:
        return len(self.averaged)


def fake(division, copied: list[tuple[Cut, Tensor]], frozen: list[tuple[Cut, Tensor]]) -> Fake:
    values = [torch.zeros(shape).numpy() for shape in division.shapes]
    ranks = range(division.ranks)
    return Fake(
        [division.layout(rank, values) for rank in ranks],
        *([tuple(cut.shard(rank, tensor) for cut, tensor in part) for rank in ranks] for part in (copied, frozen)),
    )


@dataclass(frozen=True)
class Sessions:
    """The same session on every fake rank."""

    crowd: Crowd
    each: list[Session]

    def continue_at(self, t: float) -> None:
        for session in self.each:
            session.continue_at(t)


def open_session(root: Path, model: Fake) -> Sessions:
    """Open a run on every fake rank."""
    crowd = Crowd(model.ranks)
    record = run_record("run", "steps", LABELS, model.averaged[0], model.copied[0], model.frozen[0], dtype="float32")

    def opened(rank: int) -> Session:
        live = (model.averaged[rank], model.copied[rank], model.frozen[rank])
        return Session(
            open_folder(root), record, live, jobs=Foreground(), stage=alive, timeout_s=60.0, retain=lambda run: None
        )

    return Sessions(crowd, crowd.each(opened))


def take_snapshot(sessions: Sessions, model: Fake, t: float) -> None:
    averages = [dict.fromkeys(LABELS, layout) for layout in model.averaged]
    sessions.crowd.each(lambda rank: sessions.each[rank].snapshot(Clock(t, t, 1.0), averages[rank]))


def raw_of(snapshot) -> list[Tensor]:
    """Every raw tensor of a snapshot, whole."""
    tensors = enumerate(snapshot.record.raw)
    return [snapshot.read_raw(i, 0, math.prod(tensor.shape)).reshape(tensor.shape) for i, tensor in tensors]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert same_bits(one, other)


def frozen_files(root: Path) -> list[Path]:
    return sorted((root / "frozen").rglob("*.safetensors"))


@st.composite
def raw_tensors(draw, ranks, prefix, kind):
    found = []
    for i, shape in enumerate(draw(st.lists(shapes, max_size=3))):
        tensor = random_tensor(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 999)))
        found.append((Cut(f"{prefix}{i}", kind, draw(divisions(shape, ranks))), tensor))
    return found


@examples(40)
@given(divided_models(max_ranks=4), st.data())
def test_raw_tensors_of_any_dtype_and_cut_come_back_bit_for_bit(division, data):
    # Oracle: the tensors that were cut up, and the safetensors library on each rank's files.
    copied = data.draw(raw_tensors(division.ranks, "c", "buffer"))
    frozen = data.draw(raw_tensors(division.ranks, "f", "frozen"))
    model = fake(division, copied, frozen)
    with tempfile.TemporaryDirectory() as folder:
        take_snapshot(open_session(Path(folder), model), model, 10.0)
        (snapshot,) = open_run(folder).snapshots
        tensors = [tensor for _, tensor in (*copied, *frozen)]
        assert_same(raw_of(snapshot), tensors)
        for index, tensor in enumerate(tensors):
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, tensor.numel())] * 2)))
            assert same_bits(snapshot.read_raw(index, start, stop), tensor.reshape(-1)[start:stop])
        for rank in range(division.ranks):
            path = Path(folder) / names.tensors_file(snapshot.name, rank)
            stored = tensors_in(path) if snapshot.facts.parts[rank].size else {}
            for cut, tensor in copied:
                assert_boxes(stored, f"copied:{cut.name}", cut.held[rank], tensor)
            path = Path(folder) / names.frozen_files(snapshot.facts.session, 1, rank)[0]
            stored = tensors_in(path) if snapshot.facts.parts[rank].frozen else {}
            for cut, tensor in frozen:
                assert_boxes(stored, cut.name, cut.held[rank], tensor)


def tensors_in(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)


def assert_boxes(stored: dict[str, Tensor], name: str, held, tensor: Tensor) -> None:
    boxes, replica = held
    for number, box in enumerate(boxes if replica == 0 else ()):
        if tensor.numel():
            assert same_bits(stored[f"{name}:{number}"], tensor[box.slices])


@st.composite
def histories(draw):
    """Sessions of one run, each with a number of ranks, cuts, and what changes before each snapshot."""
    model = draw(st.lists(st.tuples(shapes.filter(math.prod), st.sampled_from(DTYPES)), min_size=1, max_size=3))
    sessions = []
    for _ in range(draw(st.integers(1, 4))):
        ranks = draw(st.integers(1, 4))
        cuts = [Cut(f"f{i}", "frozen", draw(divisions(shape, ranks))) for i, (shape, _) in enumerate(model)]
        changes = draw(st.lists(st.sets(st.integers(0, len(model) - 1), max_size=1), min_size=1, max_size=3))
        sessions.append((ranks, cuts, changes, draw(st.booleans())))
    return [random_tensor(shape, dtype, i) for i, (shape, dtype) in enumerate(model)], sessions


def flip(shard: ParamShard) -> None:
    """Change one bit of the first element, in place, as a training loop would change a weight."""
    bits = shard.local[:1].view(torch.uint8)
    bits[:1] ^= 1


@examples(40)
@given(histories(), st.data())
def test_frozen_tensors_are_stored_once_and_again_only_by_the_rank_where_they_change(history, data):
    # Oracle: copies of the whole tensors at each snapshot; the files that there were before.
    tensors, sessions = history
    with tempfile.TemporaryDirectory() as folder:
        root, expected, t = Path(folder), [], 0.0
        for ranks, cuts, changes, loaded_late in sessions:
            one = rows_everywhere(ranks)
            model = fake(one, [], list(zip(cuts, tensors, strict=True)))
            if loaded_late:
                blanks = fake(one, [], [(cut, torch.zeros_like(x)) for cut, x in zip(cuts, tensors, strict=True)])
                opened = open_session(root, blanks)
                for session, layout in zip(opened.each, model.frozen, strict=True):
                    session._live = (*session._live[:2], layout)
            else:
                opened = open_session(root, model)
            opened.continue_at(t)
            for number, changed in enumerate(changes):
                before = {path: path.read_bytes() for path in frozen_files(root)}
                writers = set(range(ranks)) if not before else set()
                for index in changed:
                    rank = data.draw(st.sampled_from(holders(model, index)))
                    flip(model.frozen[rank][index])
                    tensors[index] = assembled(model, index, tensors[index])
                    writers |= {rank}
                t += 1.0
                take_snapshot(opened, model, t)
                expected.append((t, [tensor.clone() for tensor in tensors]))
                new = set(frozen_files(root)) - set(before)
                assert {int(path.stem.removeprefix("rank-")) for path in new} == {
                    rank for rank in writers if any(rank in holders(model, i) for i in range(len(tensors)))
                }, f"snapshot {number} of {ranks} ranks"
                assert all(path.read_bytes() == content for path, content in before.items())
        snapshots = open_run(root).snapshots
        assert [snapshot.t for snapshot in snapshots] == [t for t, _ in expected]
        for snapshot, (_, values) in zip(snapshots, expected, strict=True):
            assert_same(raw_of(snapshot), values)


def holders(model: Fake, index: int) -> list[int]:
    """Ranks that write elements of a frozen tensor."""
    return [r for r in range(model.ranks) if (s := model.frozen[r][index]).replica == 0 and s.local.numel()]


def assembled(model: Fake, index: int, old: Tensor) -> Tensor:
    """The whole tensor as the ranks that write it hold it."""
    tensor = torch.empty_like(old, memory_format=torch.contiguous_format)
    for rank in holders(model, index):
        shard, start = model.frozen[rank][index], 0
        for box in shard.boxes:
            tensor[box.slices] = shard.local[start : start + box.numel].view(box.sizes)
            start += box.numel
    return tensor


def test_three_snapshots_and_a_resume_on_another_number_of_ranks_take_the_bytes_of_one_store(tmp_path):
    tensor = torch.arange(60, dtype=torch.int16).reshape(12, 5)
    written = 0
    for ranks in (3, 2, 4):
        rows = 12 // ranks
        held = [((Box((rows * rank, 0), (rows, 5)),), 0) for rank in range(ranks)]
        model = fake(rows_everywhere(ranks), [], [(Cut("teacher", "frozen", held), tensor)])
        sessions = open_session(tmp_path, model)
        sessions.continue_at(written)
        # Fingerprints tell when a session is opened: nothing needs to be read.
        with mock.patch.object(frozen_module, "stored_frozen", forbidden):
            for _ in range(3):
                written += 1
                take_snapshot(sessions, model, float(written))
    files = frozen_files(tmp_path)
    assert [path.name for path in files] == [f"rank-{rank:05d}.safetensors" for rank in range(3)]
    assert sum(tensors_in(path)["teacher:0"].nbytes for path in files) == 120
    assert open_run(tmp_path).frozen_size == sum(path.stat().st_size for path in files)
    for snapshot in open_run(tmp_path).snapshots:
        assert_same(raw_of(snapshot), [tensor])
    assert [s.facts.parts[0].frozen for s in open_run(tmp_path).snapshots] == [1] * 3 + [0] * 6


def rows_everywhere(ranks: int):
    """An averaged parameter, whose rows the ranks hold."""
    return rows_of((4, 2), *[1] * (ranks - 1), 5 - ranks)


def two_ranks(first: Tensor, second: Tensor) -> Fake:
    held = [((Box((0,), (3,)),), 0), ((Box((3,), (3,)),), 0)]
    copied = [(Cut("steps", "buffer", [((whole(()),), 0), ((whole(()),), 1)]), torch.tensor(7))]
    return fake(rows_everywhere(2), copied, [(Cut("base", "frozen", held), torch.cat([first, second]))])


ONES, TWOS = torch.ones(3), torch.full((3,), 2.0)


def failing(*args, **options):
    raise StoreError("the disk is full", hint="free some space")


def test_a_snapshot_cut_short_after_the_frozen_tensors_leaves_earlier_ones_and_the_next_stores_nothing_twice(tmp_path):
    model = two_ranks(ONES, TWOS)
    sessions = open_session(tmp_path, model)
    take_snapshot(sessions, model, 1.0)
    model.frozen[1][0].local.fill_(5.0)

    def on_rank_1(folder, record, rank, *args, **options):
        return failing() if rank == 1 else write_part(folder, record, rank, *args, **options)

    with mock.patch.object(session_module, "write_part", on_rank_1), pytest.raises(StoreError, match=r"rank 1: .*full"):
        take_snapshot(sessions, model, 2.0)
    stores = frozen_files(tmp_path)
    assert len(stores) == 3
    run = open_run(tmp_path)
    assert [s.t for s in run.snapshots] == [1.0]
    assert raw_of(run.snapshots[0])[1].tolist() == [1.0] * 3 + [2.0] * 3
    take_snapshot(sessions, model, 3.0)
    assert frozen_files(tmp_path) == stores
    run = open_run(tmp_path)
    assert [raw_of(s)[1].tolist() for s in run.snapshots] == [[1.0] * 3 + [2.0] * 3, [1.0] * 3 + [5.0] * 3]
    # A run that died instead is continued by one that refers to the last finished snapshot's.
    again = open_session(tmp_path, model)
    again.continue_at(3.0)
    take_snapshot(again, model, 4.0)
    assert frozen_files(tmp_path) == stores
    assert raw_of(open_run(tmp_path).snapshots[-1])[1].tolist() == [1.0] * 3 + [5.0] * 3


def test_a_store_that_failed_half_way_is_tried_again_under_another_number(tmp_path):
    model = two_ranks(ONES, TWOS)
    sessions = open_session(tmp_path, model)

    def on_rank_0(folder, name, record):
        return failing() if record.rank == 0 else write_record(folder, name, record)

    with mock.patch.object(store_frozen, "write_record", on_rank_0), pytest.raises(StoreError, match=r"rank 0: .*full"):
        take_snapshot(sessions, model, 1.0)
    assert open_run(tmp_path).snapshots == ()
    take_snapshot(sessions, model, 2.0)
    (snapshot,) = open_run(tmp_path).snapshots
    assert [part.frozen for part in snapshot.facts.parts] == [2, 1]
    assert raw_of(snapshot)[1].tolist() == [1.0] * 3 + [2.0] * 3


def stored_pair(root: Path) -> tuple[Path, Path]:
    """A run of two snapshots between which rank 1's frozen tensors changed; the stores of rank 1."""
    model = two_ranks(ONES, TWOS)
    sessions = open_session(root, model)
    take_snapshot(sessions, model, 1.0)
    model.frozen[1][0].local.fill_(5.0)
    take_snapshot(sessions, model, 2.0)
    _, first, second = sorted(frozen_files(root), key=lambda path: (path.name, path.parent.name))
    return first, second


@pytest.mark.parametrize(
    "harm", ["truncated", "swapped", "missing", "another number", "record missing", "record swapped"]
)
def test_a_damaged_store_of_frozen_tensors_is_named_and_other_snapshots_are_read(tmp_path, harm):
    first, second = stored_pair(tmp_path)
    other = first.with_name("rank-00000.safetensors")
    victim = second
    if harm == "truncated":
        second.write_bytes(second.read_bytes()[:-1])
    elif harm == "swapped":
        shutil.copyfile(other, second)
    elif harm == "missing":
        second.unlink()
    elif harm == "another number":
        shutil.copyfile(first, second)
    else:
        victim = second.with_suffix(".json")
        victim.unlink()
        if harm == "record swapped":
            shutil.copyfile(first.with_suffix(".json"), victim)
    before, after = open_run(tmp_path).snapshots
    with pytest.raises(StoreError) as caught:
        raw_of(after)
    assert str(victim.relative_to(tmp_path)) in caught.value.message
    assert str(tmp_path) in caught.value.message
    assert caught.value.hint
    with pytest.raises(StoreError):
        for layer in after.frozen:
            layer.check()
    for layer in before.frozen:
        layer.check()
    assert raw_of(before)[1].tolist() == [1.0] * 3 + [2.0] * 3
    # A session that cannot read what is stored stores its own.
    model = two_ranks(ONES, TWOS)
    sessions = open_session(tmp_path, model)
    sessions.continue_at(2.0)
    take_snapshot(sessions, model, 3.0)
    assert raw_of(open_run(tmp_path).snapshots[-1])[1].tolist() == [1.0] * 3 + [2.0] * 3


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"frozen_numbers": (1,)}, "those of 1 ranks of session .*, which has 2"),
        ({"frozen_from": "", "frozen_numbers": ()}, "no session before it stored any"),
        ({"frozen_from": "elsewhere"}, r"of session elsewhere, which is missing"),
        ({"frozen_from": None}, "1 refer to it"),
    ],
)
def test_a_session_whose_record_of_frozen_tensors_cannot_be_is_refused(tmp_path, changed, text):
    model = two_ranks(ONES, TWOS)
    for t in (1.0, 2.0):
        sessions = open_session(tmp_path, model)
        sessions.continue_at(t - 1.0)
        take_snapshot(sessions, model, t)
    path = tmp_path / names.session_file(sessions.each[0]._name)
    record = decode(SessionRecord, path.read_bytes(), path)
    assert record.frozen_numbers == (1, 1)
    path.write_bytes(encode(replace(record, **{k: record.session if v is None else v for k, v in changed.items()})))
    run = open_run(tmp_path)
    if run.damaged:
        assert re.search(text, run.damaged[0].reason)
    else:
        with pytest.raises(StoreError, match=text) as caught:
            raw_of(run.snapshots[1])
        assert caught.value.hint
    assert raw_of(open_run(tmp_path).snapshots[0])[1].tolist() == [1.0] * 3 + [2.0] * 3


def test_copied_tensors_of_a_swapped_or_truncated_part_are_refused(tmp_path):
    model = two_ranks(ONES, TWOS)
    sessions = open_session(tmp_path, model)
    for t in (1.0, 2.0):
        take_snapshot(sessions, model, t)
    first, second = (Path(s.where) / "rank-00000.safetensors" for s in open_run(tmp_path).snapshots)
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(StoreError, match=r"rank-00000\.safetensors is damaged"):
        raw_of(open_run(tmp_path).snapshots[0])
    first.write_bytes(kept[:-1])
    run = open_run(tmp_path)
    assert [s.t for s in run.snapshots] == [2.0]
    assert "bytes" in run.damaged[0].reason


# Whole models in one process: what is rebuilt is the model's own state dict.


class Convolved(nn.Module):
    """Running statistics, a whole number, a mask with infinities beside it, and a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, bias=False)  # a bias before the norm would have no gradient
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("mask", torch.tensor([[True, False], [False, True]]))
        self.register_buffer("bias", torch.tensor([0.0, -math.inf], dtype=torch.float64))
        self.register_buffer("cache", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Adapted(nn.Module):
    """A base in bfloat16 that does not train, and adapters in float32 that do."""

    def __init__(self, rows: int = 6) -> None:
        super().__init__()
        self.base = nn.Linear(5, rows, dtype=torch.bfloat16).requires_grad_(False)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, rows, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x.bfloat16()).float() + self.up(self.down(x))


def step(model: nn.Module, *shape: int, seed: int) -> None:
    """One step of plain gradient descent."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def rebuilt(root: Path, out: Path, target="0.1", **options) -> dict[str, Tensor]:
    plan = reconstruct(root, [target], out=out, **options)
    return tensors_of(out / plan.targets[0].target.slug)


def check_against_state(found: dict[str, Tensor], state: dict[str, Tensor], averaged: set[str]) -> None:
    """Everything that is not averaged is the state dict's, bit for bit; the rest has its shapes."""
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        if name in averaged:
            assert found[name].shape == tensor.shape
            assert found[name].dtype == torch.float32
            assert not torch.equal(found[name], tensor), f"{name} is the average, not the weights"
        else:
            assert same_bits(found[name], tensor), name


def test_a_model_with_batch_norm_masks_and_counters_comes_out_whole(tmp_path):
    torch.manual_seed(0)
    model = Convolved()
    averaged = {name for name, _ in model.named_parameters()}
    states = {}
    with PostHocEMA(model, tmp_path / "run", snapshot_every=4) as ema:
        for t in range(1, 13):
            step(model, 3, 2, 5, 5, seed=t)
            ema.update(t)
            states[t] = state_of(model)
    assert states[12]["norm.num_batches_tracked"] == 12
    found = rebuilt(tmp_path / "run", tmp_path / "last")
    check_against_state(found, states[12], averaged)
    model.load_state_dict(found)  # strictly: nothing is missing and nothing too many
    # As of an earlier time: the last snapshot at or before it, or the first.
    check_against_state(rebuilt(tmp_path / "run", tmp_path / "then", "0.1@t=11"), states[8], averaged)
    check_against_state(rebuilt(tmp_path / "run", tmp_path / "first", "0.1@t=4"), states[4], averaged)
    # In another dtype buffers keep theirs, and several files have an index.
    low = reconstruct(tmp_path / "run", ["0.1"], out=tmp_path / "low", dtype="bfloat16", max_shard_size=64)
    found = tensors_of(tmp_path / "low" / low.targets[0].target.slug)
    assert len(list((tmp_path / "low" / "0.1").glob("*.safetensors"))) > 1
    for name, tensor in states[12].items():
        assert found[name].dtype == (torch.bfloat16 if name in averaged else tensor.dtype)


def test_a_model_with_adapters_comes_out_with_its_base_which_is_stored_once(tmp_path):
    torch.manual_seed(0)
    model, sizes = Adapted(), []
    for begin in (0, 6):
        with PostHocEMA(model, tmp_path / "run", snapshot_every=2) as ema:
            if begin:
                ema.resume()
            for t in range(begin + 1, begin + 7):
                step(model, 4, 5, seed=t)
                ema.update(t)
        sizes.append([path.stat().st_size for path in frozen_files(tmp_path / "run")])
    assert len(sizes[0]) == 1
    assert sizes[0] == sizes[1]
    state = {name: tensor.float() for name, tensor in state_of(model).items()}
    found = rebuilt(tmp_path / "run", tmp_path / "wide")
    check_against_state(found, state, {"down.weight", "up.weight"})
    low = rebuilt(tmp_path / "run", tmp_path / "low", dtype="bfloat16")
    assert same_bits(low["base.weight"], model.base.weight)
    assert same_bits(low["up.weight"], found["up.weight"].bfloat16())
    (snapshot, *_) = open_run(tmp_path / "run").snapshots
    assert "base" not in "".join(tensors_of(snapshot.where))


def test_a_teacher_that_is_updated_in_place_is_rebuilt_as_it_was_at_each_time(tmp_path):
    model = nn.ModuleDict({"student": nn.Linear(2, 2), "teacher": nn.Linear(2, 2).requires_grad_(False)})
    ema = PostHocEMA(model, tmp_path / "run", snapshot_every=5)
    for t in range(1, 16):
        with torch.no_grad():
            model["student"].weight += 1.0
            if t in (7, 13):
                model["teacher"].weight.fill_(float(t))
        ema.update(t)
        if t == 5:
            first = model["teacher"].weight.clone()
    assert len(frozen_files(tmp_path / "run")) == 3
    for t, expected in ((5, first), (10, 7.0), (14, 7.0), (15, 13.0)):
        found = rebuilt(tmp_path / "run", tmp_path / f"{t}", f"0.1@t={t}")["teacher.weight"]
        assert torch.equal(found, torch.as_tensor(expected).expand(2, 2)), t
    several = reconstruct(tmp_path / "run", ["0.1@t=5", "0.1@t=15", "0.08@t=15"], out=tmp_path / "several")
    values = [tensors_of(tmp_path / "several" / p.target.slug)["teacher.weight"] for p in several.targets]
    assert [value[0, 0].item() for value in values] == [first[0, 0].item(), 13.0, 13.0]


def test_excluded_parameters_are_copied_and_written_in_the_dtype_of_the_rest(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with PostHocEMA(model, tmp_path / "run", snapshot_every=3, exclude=["2.*"]) as ema:
        for t in range(1, 7):
            step(model, 5, 3, seed=t)
            ema.update(t)
    state = state_of(model)
    check_against_state(rebuilt(tmp_path / "run", tmp_path / "out"), state, {"0.weight", "0.bias"})
    low = rebuilt(tmp_path / "run", tmp_path / "low", dtype="float16")
    assert same_bits(low["2.weight"], state["2.weight"].half())
    by_tensor = reconstruct(tmp_path / "run", {"0.weight": 0.08, "*": 0.1}, out=tmp_path / "mixed")
    assert same_bits(tensors_of(tmp_path / "mixed" / by_tensor.outputs[0].output.slug)["2.bias"], state["2.bias"])


def test_buffers_are_averaged_like_parameters_where_asked_for_and_omitted_where_asked_for(tmp_path):
    # Oracle: a parameter that takes the same values.
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(3))
    model.register_buffer("running", torch.zeros(3))
    model.register_buffer("count", torch.tensor(0))
    emas = {mode: PostHocEMA(model, tmp_path / mode, snapshot_every=5, buffers=mode) for mode in ("average", "omit")}
    for t in range(1, 11):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([t, t * t, math.sin(t)]))
            model.running.copy_(model.weight)
            model.count += 1
        for ema in emas.values():
            ema.update(t)
    found = rebuilt(tmp_path / "average", tmp_path / "out")
    assert found.keys() == {"weight", "running", "count"}
    assert same_bits(found["running"], found["weight"])
    assert not torch.equal(found["running"], model.running)
    assert found["count"].item() == 10
    assert rebuilt(tmp_path / "omit", tmp_path / "less").keys() == {"weight"}


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_one_after_another_write_the_bytes_of_one(tmp_path, monkeypatch, workers):
    torch.manual_seed(0)
    model = Convolved()
    model.conv.requires_grad_(False)
    with PostHocEMA(model, tmp_path / "run", snapshot_every=2) as ema:
        for t in range(1, 5):
            step(model, 3, 2, 5, 5, seed=t)
            ema.update(t)
    monkeypatch.setattr(grid, "BLOCK", 5)
    reconstruct(tmp_path / "run", ["0.1"], out=tmp_path / "one", max_shard_size=150)
    for worker in range(workers):
        reconstruct(
            tmp_path / "run", ["0.1"], out=tmp_path / "many", max_shard_size=150, worker=worker, workers=workers
        )
    one = listing(tmp_path / "one")
    assert sum(name.endswith(".safetensors") for name in one) > 1
    assert listing(tmp_path / "many") == one


# What does not fit.


def with_buffer(buffer: Tensor) -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("extra", buffer)
    return model


@pytest.mark.parametrize("buffer", [torch.zeros(2, dtype=torch.complex128), torch.eye(2).to_sparse()])
def test_a_tensor_that_no_file_can_hold_is_refused_by_name_before_anything_is_written(tmp_path, buffer):
    with pytest.raises(UnsupportedModel, match=r"extra: .*cannot be stored") as caught:
        PostHocEMA(with_buffer(buffer), tmp_path / "run")
    assert "omit" in caught.value.hint
    assert listing(tmp_path) == {}
    PostHocEMA(with_buffer(buffer), tmp_path / "run", buffers="omit")


def test_storage_that_was_replaced_is_followed_and_another_dtype_or_shape_is_refused(tmp_path):
    model = with_buffer(torch.zeros(3))
    ema = PostHocEMA(model, tmp_path / "run", snapshot_every=1e9)
    ema.update(1)
    model.extra = torch.tensor([1.0, 2.0, 3.0])
    ema.snapshot()
    assert raw_of(open_run(tmp_path / "run").snapshots[0])[0].tolist() == [1.0, 2.0, 3.0]
    for other in (torch.zeros(3, dtype=torch.float64), torch.zeros(4)):
        model.extra = other
        ema.update()
        with pytest.raises(ModelMismatch, match=r"extra: this rank held \(3,\) of it in float32") as caught:
            ema.snapshot()
        assert caught.value.hint
    model.extra = torch.zeros(3)
    ema.snapshot()
    assert [s.t for s in open_run(tmp_path / "run").snapshots] == [1.0, 3.0]


def test_strided_tensors_are_stored_row_by_row(tmp_path):
    model = with_buffer(torch.arange(6.0).view(2, 3).t())
    model.turned = nn.Parameter(torch.arange(8.0).view(2, 4).t(), requires_grad=False)
    assert not model.extra.is_contiguous()
    with PostHocEMA(model, tmp_path / "run") as ema:
        ema.update()
    found = rebuilt(tmp_path / "run", tmp_path / "out")
    assert torch.equal(found["extra"], model.extra)
    assert torch.equal(found["turned"], model.turned)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (lambda: (with_buffer(torch.zeros(2)), {"buffers": "omit"}), "other copied tensors"),
        (lambda: (with_buffer(torch.zeros(2, dtype=torch.int64)), {}), "extra .* int64"),
        (lambda: (with_buffer(torch.zeros(2)).requires_grad_(False), {"buffers": "average"}), "other parameters"),
    ],
)
def test_a_folder_of_a_model_with_other_raw_tensors_is_refused(tmp_path, other, text):
    PostHocEMA(with_buffer(torch.zeros(2)), tmp_path / "run")
    model, options = other()
    with pytest.raises(ModelMismatch, match=text):
        PostHocEMA(model, tmp_path / "run", **options)


def test_a_frozen_weight_too_large_for_the_output_is_named_and_nothing_is_left(tmp_path):
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.tensor([1.0, 1e6]), requires_grad=False)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf, 1e6]))
    with PostHocEMA(model, tmp_path / "run") as ema:
        ema.update()
    before = listing(tmp_path)
    with pytest.raises(OutputError, match=r"scale: its largest magnitude 1e\+06 does not fit float16"):
        reconstruct(tmp_path / "run", ["0.1"], out=tmp_path / "out", dtype="float16")
    assert listing(tmp_path) == before
    # The buffer keeps its dtype, and its infinity.
    assert rebuilt(tmp_path / "run", tmp_path / "wide", dtype="bfloat16")["mask"].tolist() == [0.0, -math.inf, 1e6]


def test_quantized_weights_keep_their_8_bits(tmp_path):
    model = nn.Linear(2, 2)
    model.packed = nn.Parameter(torch.tensor([1, -2, 3], dtype=torch.int8), requires_grad=False)
    model.eighth = nn.Parameter(torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn), requires_grad=False)
    with PostHocEMA(model, tmp_path / "run") as ema:
        ema.update()
    found = rebuilt(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    assert same_bits(found["packed"], model.packed)
    assert same_bits(found["eighth"], model.eighth)


# Real ranks.


def adapted_body(folder: str, resumed: bool) -> None:
    torch.manual_seed(0)
    model = Adapted(rows=7)
    for part in (model.base, model.down, model.up):
        fully_shard(part)
    fully_shard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    model.register_buffer("seen", torch.tensor(0))
    root = Path(folder) / "run"
    ema = PostHocEMA(model, root, snapshot_every=2)
    begin = int(ema.resume()) if resumed else 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for t in range(begin + 1, begin + 5):
        model(torch.randn(3, 5, generator=torch.Generator().manual_seed(t))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.seen += 1
        with mock.patch.multiple(
            dist, all_gather_object=forbidden, broadcast_object_list=forbidden, broadcast=forbidden
        ):
            ema.update(t)
    whole_state = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        for name, tensor in model.state_dict().items()
    }
    plan = reconstruct(root, ["0.1"], out=Path(folder) / f"out-{begin}")
    if dist.get_rank() == 0:
        found = load_file(Path(folder) / f"out-{begin}" / plan.targets[0].target.slug / "model.safetensors")
        expected = {n: x if n == "seen" else x.float() for n, x in whole_state.items()}
        check_against_state(found, expected, {"down.weight", "up.weight"})
        assert model.base.weight.dtype == torch.bfloat16


def plain_body(folder: str) -> None:
    """All ranks hold everything: each writes an equal part of the base."""
    torch.manual_seed(0)
    model = Adapted(rows=8)
    with PostHocEMA(nn.parallel.DistributedDataParallel(model), Path(folder) / "run", snapshot_every=1) as ema:
        ema.update(1)
    dist.barrier()
    sizes = [sum(x.nbytes for x in tensors_in(path).values()) for path in frozen_files(Path(folder) / "run")]
    assert sizes == [48, 48]
    snapshot = open_run(Path(folder) / "run").snapshots[0]
    assert_same(raw_of(snapshot), [model.base.weight.detach(), model.base.bias.detach()])


def sharded_body(first: str, second: str) -> None:
    adapted_body(first, False)
    plain_body(second)


def test_a_sharded_model_with_adapters_comes_out_whole_and_its_base_is_stored_once(tmp_path):
    # Oracle: full_tensor() of every DTensor.
    run_ranks(2, sharded_body, str(tmp_path / "fsdp"), str(tmp_path / "ddp"))
    files = frozen_files(tmp_path / "fsdp" / "run")
    assert len(files) == 2, "each rank stored its own shards"
    run_ranks(3, adapted_body, str(tmp_path / "fsdp"), True)
    assert frozen_files(tmp_path / "fsdp" / "run") == files
    assert [len(s.facts.parts) for s in open_run(tmp_path / "fsdp" / "run").snapshots] == [2, 2, 3, 3]
