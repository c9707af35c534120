"""Export to DCP: what stock torch.distributed.checkpoint reads is what the safetensors export holds, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sharded_phema import export_dcp
from sharded_phema.errors import OutputError, PhemaError
from sharded_phema.export_dcp import shares
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct

# Torch says so of every load outside a process group.
pytestmark = pytest.mark.filterwarnings("ignore:.*single process")

TARGETS = ["0.07", "window:0.3"]


class Odd(nn.Module):
    """Rows that do not divide, a scalar, an empty tensor, buffers of other dtypes, and a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(401, 397)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.base = nn.Parameter(torch.randn(5, 3).to(torch.bfloat16), requires_grad=False)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([[True, False], [False, True]]))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six snapshots of an odd model that walks."""
    torch.manual_seed(5)
    folder, model = tmp_path_factory.mktemp("run") / "ema", Odd()
    with PostHocEMA(model, folder, snapshot_every=20) as ema, torch.no_grad():
        for step in range(1, 121):
            for param in (model.wide.weight, model.wide.bias, model.scale):
                param += 0.01 * torch.randn_like(param)
            ema.update(step)
    return folder


def same(found: Tensor, expected: Tensor) -> bool:
    """Same dtype, shape and bits."""
    alike = found.dtype == expected.dtype and found.shape == expected.shape
    return alike and found.contiguous().view(-1).view(torch.uint8).equal(
        expected.contiguous().view(-1).view(torch.uint8)
    )


def expected_of(root: Path, out: Path, dtype: str) -> dict[str, dict[str, Tensor]]:
    """What the safetensors export holds, by target."""
    reconstruct(root, TARGETS, out=out, dtype=dtype)
    return {path.parent.name: load_file(path) for path in out.glob("*/model.safetensors")}


def check(folder: Path, expected: dict[str, Tensor], scratch: Path) -> None:
    """Both ways in which stock DCP reads a checkpoint give the expected tensors."""
    plain = {name: torch.full_like(tensor, 1) for name, tensor in expected.items()}
    dcp.load(plain, checkpoint_id=folder)
    assert all(same(plain[name], tensor) for name, tensor in expected.items())
    dcp_to_torch_save(folder, scratch)
    whole = torch.load(scratch, weights_only=True)
    assert whole.keys() == expected.keys()
    assert all(same(whole[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stock_dcp_reads_the_bits_of_the_safetensors_export(root: Path, tmp_path: Path, dtype: str) -> None:
    expected = expected_of(root, tmp_path / "files", dtype)
    reconstruct(root, TARGETS, out=tmp_path / "dcp", dtype=dtype, format="dcp")
    assert {path.name for path in (tmp_path / "dcp").iterdir()} == expected.keys(), "a folder a target, and no drafts"
    for slug, tensors in expected.items():
        assert len(tensors) == 7
        check(tmp_path / "dcp" / slug, tensors, tmp_path / f"{slug}.pt")
        recipe = (tmp_path / "files" / slug / "phema.json").read_text()
        assert (tmp_path / "dcp" / slug / "phema.json").read_text() == recipe


def export_and_load(root: str, out: str) -> dict[str, dict[str, Tensor]]:
    """Export on all ranks, and load into DTensors that are cut along columns and rows."""
    reconstruct(root, TARGETS, out=out, format="dcp")
    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), {}
    for folder in sorted(Path(out).iterdir()):
        state = {
            "wide.weight": distribute_tensor(torch.zeros(397, 401), mesh, [Shard(1)]),
            "wide.bias": distribute_tensor(torch.zeros(397), mesh, [Shard(0)]),
            "scale": torch.zeros(()),
        }
        dcp.load(state, checkpoint_id=folder)
        found[folder.name] = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}
    return found


def failing_part(root: str, out: str, failure: Exception) -> tuple[str, list[str]]:
    """What is raised where one rank cannot write its part, and what is left."""

    def refuse(*args: object) -> object:
        raise failure

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(export_dcp.FileSystemWriter, "write_data", refuse)
        try:
            reconstruct(root, TARGETS, out=out, format="dcp")
        except PhemaError as error:
            dist.barrier()
            return error.message, [path.name for path in Path(out).parent.iterdir()]
    return "nothing was raised", []


def failing_and_again(root: str, out: str) -> tuple[list[tuple[str, list[str]]], int]:
    """What is raised and left by a failure of the writer and one of the disk; what is read when the disk is mended."""
    failures = [failing_part(root, out, error) for error in (ValueError("no sense"), OSError("no space left"))]
    dist.barrier()
    plan = reconstruct(root, TARGETS, out=out, format="dcp")
    assert plan.summary is not None
    return failures, plan.summary.read


def on_two(root: str, folder: str) -> tuple[object, ...]:
    """Both on the same ranks, which take a while to start."""
    return export_and_load(root, f"{folder}/dcp"), failing_and_again(root, f"{folder}/failed/dcp")


def test_two_processes_write_half_each_that_loads_into_dtensors_and_a_failure_of_one_leaves_nothing_half_done(
    root: Path, tmp_path: Path
) -> None:
    expected = expected_of(root, tmp_path / "files", "float32")
    (tmp_path / "failed").mkdir()
    for found, (failures, read) in run_ranks(2, on_two, str(root), str(tmp_path)):
        assert found.keys() == expected.keys()
        for slug, tensors in found.items():
            assert all(same(tensor, expected[slug][name]) for name, tensor in tensors.items())
        (message, left), (full, kept) = failures
        assert re.search("process 1 cannot write its part of the checkpoint: no sense", message), message
        assert re.search("process 1 cannot write its part of the checkpoint: no space left", full), full
        # A full disk can be mended, and what was rebuilt is there yet.
        assert (left, kept, read) == ([], [".dcp.partial"], 0)
    for slug, tensors in expected.items():
        folder = tmp_path / "dcp" / slug
        check(folder, tensors, tmp_path / f"{slug}.pt")
        check(tmp_path / "failed" / "dcp" / slug, tensors, tmp_path / f"{slug}-again.pt")
        sizes = sorted(path.stat().st_size for path in folder.glob("*.distcp"))
        assert len(sizes) == 2 and sizes[0] > 0.9 * sizes[1], "each process writes half"


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 9))
def test_shares_of_all_processes_are_every_element_once_and_nearly_equal(numels: list[int], size: int) -> None:
    # Oracle: counting element by element.
    seen: list[list[int]] = [[] for _ in numels]
    for rank in range(size):
        count = 0
        for number, span in enumerate(shares(numels, rank, size)):
            if span is not None:
                assert span[0] < span[1] or (numels[number] == 0 and rank == 0)
                seen[number] += range(*span)
                count += span[1] - span[0]
        assert abs(count - sum(numels) / size) <= 1
    assert seen == [[*range(numel)] for numel in numels]


@pytest.mark.parametrize("moment", ["before drafts go", "while drafts go"])
def test_killed_while_checkpoints_are_made_the_next_call_makes_them_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    # Oracle: the safetensors export. What kills leaves no process the time to tidy up.
    expected = expected_of(root, tmp_path / "files", "float32")

    class Killed(BaseException):
        pass

    def kill(folder: Path, *args: object, **options: object) -> None:
        if moment == "while drafts go":
            (Path(folder) / "0.07" / "model.safetensors").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("sharded_phema.rebuild._remove" if moment == "before drafts go" else "shutil.rmtree", kill)
        with pytest.raises(Killed):
            reconstruct(root, TARGETS, out=tmp_path / "out" / "dcp", format="dcp")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".dcp.partial"]
    plan = reconstruct(root, TARGETS, out=tmp_path / "out" / "dcp", format="dcp")
    assert plan.summary is not None and plan.summary.read == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dcp"]
    assert {path.name for path in (tmp_path / "out" / "dcp").iterdir()} == expected.keys()
    for slug, tensors in expected.items():
        check(tmp_path / "out" / "dcp" / slug, tensors, tmp_path / f"{slug}.pt")


def test_formats_that_do_not_exist_and_urls_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="format: expected safetensors or dcp, found 'pickle'"):
        reconstruct(root, TARGETS, out=tmp_path / "out", format="pickle")
    with pytest.raises(OutputError, match="s3://bucket/out: expected a local folder"):
        reconstruct(root, TARGETS, out="s3://bucket/out")
    assert [*tmp_path.iterdir()] == []
