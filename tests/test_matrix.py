"""README's table of backends and features: every row is trained, stored, rebuilt, swapped and resumed here."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from allocations import Allocations
from builders import same_bits, tensors_of
from matrix import KINDS, assembled, batch, make_block, pieces
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from sharded_phema.load import load_into
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct

README = Path(__file__).parents[1] / "README.md"
STEPS, EVERY = 5, 2
FEATURES = ["averages", "snapshot", "rebuilt", "swap", "resume", "load"]


def rows() -> list[list[str]]:
    """The cells of the table under "What works where"."""
    section = README.read_text().split("## What works where")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_of_the_readme_names_what_is_tried_here_and_nothing_else() -> None:
    head, _, *body = rows()
    assert head == ["model", *FEATURES]
    told = {re.split(r"[:,] ", row[0], maxsplit=1)[0] for row in body}
    assert told == {re.split(r"[:,] ", kind.row, maxsplit=1)[0] for kind in KINDS.values()}
    assert all(len(row) == len(head) and all(row) for row in body)


def live(ema: PostHocEMA) -> list:
    """Pieces of the weights that are averaged now."""
    return pieces({"weights": ema._layout})


def row_body(kind: str, root: Path) -> dict[str, Any]:
    """Train, and tell what a rank saw: its pieces of weights and averages, and what forward gave."""
    with KINDS[kind].make() as sharded:
        ema = PostHocEMA(sharded.model, root, snapshot_every=EVERY, optimizer=sharded.optimizer)
        seen: dict[str, Any] = {"path": []}
        for step in range(1, STEPS + 1):
            sharded.step(step)
            with CommDebugMode() as update:
                ema.update(step)
            assert update.get_total_counts() == 0 or step % EVERY == 0
            seen["path"].append(live(ema))
        ema.snapshot()
        seen["averages"] = pieces(ema._averages_by_label())
        with torch.no_grad():
            before = sharded.forward(batch(0))
            with ema.swapped(sigma_rel=0.10):
                seen["tracked"] = sharded.forward(batch(0))
            with pytest.raises(RuntimeError, match="evaluation"), ema.swapped("window:0.5"):
                seen["rebuilt"] = sharded.forward(batch(0))
                raise RuntimeError("in the evaluation")
            assert torch.equal(sharded.forward(batch(0)), before)
        assert all(same_bits(a[4], b[4]) for a, b in zip(live(ema), seen["path"][-1], strict=True))
        sharded.step(STEPS + 1)  # training goes on
        ema.close()
        load_into(sharded.model, "window:0.5@t=5", root, optimizer=sharded.optimizer)
        seen["loaded"] = live(ema)
        with torch.no_grad():
            seen["of loaded"] = sharded.forward(batch(0))
        return seen


def plainly_averaged(path: list[dict[str, Tensor]], root: Path) -> dict[str, dict[str, Tensor]]:
    """The oracle: averages of the same weights, set by hand in a module that nobody shards."""
    model = make_block()
    ema = PostHocEMA(model, root, snapshot_every=EVERY)
    for step, weights in enumerate(path, 1):
        model.load_state_dict(weights, strict=False)
        ema.update(step)
    return assembled([pieces(ema._averages_by_label())])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_the_table_is_true(tmp_path, kind) -> None:
    ranks = run_ranks(KINDS[kind].ranks, row_body, kind, tmp_path / "run", timeout=240.0)
    path = [assembled([rank["path"][step] for rank in ranks])["weights"] for step in range(STEPS)]
    assert not any(torch.equal(path[0][name], path[-1][name]) for name in path[0]), "it trains"
    averages = assembled([rank["averages"] for rank in ranks])
    expected = plainly_averaged(path, tmp_path / "one")
    for label, average in expected.items():
        assert all(same_bits(averages[label][name], value) for name, value in average.items())

    labels, model = list(expected), make_block()
    reconstruct(tmp_path / "run", ["0.10@t=5", "window:0.5@t=5"], out=tmp_path / "out")
    stored, window = (
        tensors_of(tmp_path / "out" / slug) for slug in sorted(p.name for p in (tmp_path / "out").iterdir())
    )
    assert all(same_bits(stored[name], value) for name, value in expected[labels[1]].items())
    loaded = assembled([rank["loaded"] for rank in ranks])["weights"]
    assert all(same_bits(value, window[name]) for name, value in loaded.items())
    for weights, feature in ((stored, "tracked"), (window, "rebuilt"), (window, "of loaded")):
        model.load_state_dict(weights)  # strict: buffers are in the folder too
        with torch.no_grad():
            wanted = model(batch(0))
        for rank in ranks:
            torch.testing.assert_close(rank[feature], wanted, rtol=KINDS[kind].tolerance, atol=KINDS[kind].tolerance)


CHAIN = ["zero3", "fsdp2", "ddp", "fsdp1", "hsdp", "zero2", "fsdp2+tp", "zero1", "fsdp1-flat", "tp", "zero3-bf16"]


def chain_body(kind: str, root: Path, source: Path | None, target: Path, *, stateful: bool) -> tuple[list, float]:
    """Load averages that another way of sharding saved, and save them again."""
    with KINDS[kind].make() as sharded:
        ema = PostHocEMA(sharded.model, root, snapshot_every=EVERY, optimizer=sharded.optimizer)
        if source is None:
            for step in range(1, STEPS + 1):
                sharded.step(step)
                ema.update(step)
        elif stateful:
            dcp.load({"ema": ema}, checkpoint_id=source)
        else:
            ema.resume()
        dcp.save({"ema": ema}, checkpoint_id=target)
        return pieces(ema._averages_by_label()), ema.t


def test_averages_saved_under_any_way_of_sharding_load_under_any_other(tmp_path) -> None:
    """Oracle: what was saved first. One chain goes through every way, as its source and as its target."""
    source, first = None, None
    for place, kind in enumerate([*CHAIN, CHAIN[0]]):
        target = tmp_path / f"checkpoint-{place}"
        results = run_ranks(KINDS[kind].ranks, _chained, kind, tmp_path / f"run-{place}", source, target, timeout=240.0)
        found = assembled([pieces for pieces, _ in results])
        first = first or found
        assert found.keys() == first.keys()
        for label, average in first.items():
            assert all(same_bits(found[label][name], value) for name, value in average.items()), (kind, label)
        assert {t for _, t in results} == {float(STEPS)}
        source = target


def large(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(1024, 1023, bias=False))
    return fully_shard(model) if kind == "fsdp2" else nn.parallel.DistributedDataParallel(model)


def saving_body(kind: str, root: Path) -> tuple[int, float]:
    model = large(kind)
    ema = PostHocEMA(model, root / kind, snapshot_every=1e9)
    ema.update()
    with Allocations() as made:
        dcp.save({"ema": ema}, checkpoint_id=root / "checkpoint")
        ema.close()
    return made.elements, float(next(iter(model.parameters())).sum())


def loading_body(kind: str, root: Path) -> int:
    ema = PostHocEMA(large(kind), root / f"again-{kind}", snapshot_every=1e9)
    with Allocations() as made:
        dcp.load({"ema": ema}, checkpoint_id=root / "checkpoint")
    other = PostHocEMA(large(kind), root / "fsdp2", snapshot_every=1e9)
    with Allocations() as more:
        other.resume()
    own, snapshot = pieces(ema._averages_by_label()), pieces(other._averages_by_label())
    assert all(same_bits(a[4], b[4]) for a, b in zip(own, snapshot, strict=True))
    return max(made.elements, more.elements)


def test_no_rank_ever_holds_a_whole_tensor_when_averages_go_from_one_sharding_to_another(tmp_path) -> None:
    full = 1024 * 1023
    assert all(largest <= full / 4 + 1024 for largest, _ in run_ranks(4, saving_body, "fsdp2", tmp_path))
    # What four ranks saved is read piece by piece by two.
    assert all(largest <= full / 2 + 1024 for largest in run_ranks(2, loading_body, "ddp", tmp_path))


def _chained(kind: str, root: Path, source: Path | None, target: Path) -> tuple[list, float]:
    return chain_body(kind, root, source, target, stateful=True)


def _from_snapshot(kind: str, root: Path, source: Path | None, target: Path) -> tuple[list, float]:
    return chain_body(kind, root, source, target, stateful=False)


@pytest.fixture(scope="module")
def stored_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    """A run that three ranks stored, of which tests take copies, and its averages."""
    root = tmp_path_factory.mktemp("stored") / "run"
    return root, assembled(run_ranks(3, _stored_by_fsdp2, root))


@pytest.mark.parametrize("kind", ["ddp", "hsdp", "fsdp2+tp", "fsdp1", "zero2", "zero3"])
def test_averages_come_back_from_the_last_snapshot_alone(tmp_path, stored_run, kind) -> None:
    root, expected = stored_run
    shutil.copytree(root, tmp_path / "run")
    results = run_ranks(KINDS[kind].ranks, _from_snapshot, kind, tmp_path / "run", tmp_path, tmp_path / "next")
    found = assembled([pieces for pieces, _ in results])
    for label, average in expected.items():
        assert all(same_bits(found[label][name], value) for name, value in average.items())
    assert {t for _, t in results} == {float(STEPS)}


def _stored_by_fsdp2(root: Path) -> list:
    with KINDS["fsdp2"].make() as sharded:
        ema = PostHocEMA(sharded.model, root, snapshot_every=EVERY)
        for step in range(1, STEPS + 1):
            sharded.step(step)
            ema.update(step)
        ema.close()
        return pieces(ema._averages_by_label())


def async_body(root: Path) -> bool:
    """Whether what ``dcp.async_save`` wrote while training went on is what the averages were when it was called."""
    group = dist.new_group(backend="gloo")
    with KINDS["ddp"].make() as sharded:
        ema = PostHocEMA(sharded.model, root / "run", snapshot_every=1e9)
        sharded.step(1)
        ema.update(1)
        writing = dcp.async_save({"ema": ema}, checkpoint_id=root / "checkpoint", process_group=group)
        saved = pieces(ema._averages_by_label())
        for step in (2, 3):
            sharded.step(step)
            ema.update(step)
        moved = zip(pieces(ema._averages_by_label()), saved, strict=True)
        assert not any(torch.equal(a[4], b[4]) for a, b in moved if a[4].numel())
        writing.result()
        other = PostHocEMA(sharded.model, root / "other")
        dcp.load({"ema": other}, checkpoint_id=root / "checkpoint")
        found = pieces(other._averages_by_label())
        return all(same_bits(a[4], b[4]) for a, b in zip(found, saved, strict=True) if a[4].numel())


def test_the_state_goes_through_an_asynchronous_checkpoint_of_ones_own(tmp_path) -> None:
    assert all(run_ranks(2, async_body, tmp_path))
