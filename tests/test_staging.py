"""Copies on the host: equal to the last bit, of one moment, in memory that is made once and no larger than they are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from allocations import Allocations
from builders import LABELS, examples, shapes
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sharded_phema import staging
from sharded_phema.averages import Averages
from sharded_phema.errors import OrderError
from sharded_phema.folder import open_folder
from sharded_phema.layout import ParamShard, ShardLayout, whole
from sharded_phema.manifest import SnapshotRecord
from sharded_phema.staging import HostCopies
from sharded_phema.store import squared_norms, write_part

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8)


def shard_of(name: str, local: Tensor, replica: int = 0) -> ParamShard:
    shape = tuple(local.shape)
    return ParamShard(name, shape, (whole(shape),), local, lambda: local, replica=replica, holders=replica + 1)


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def bits(tensor: Tensor) -> bytes:
    """Every bit, those of NaNs and negative zeros too, in row-major order."""
    return torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.reshape(-1)).view(torch.uint8).numpy().tobytes()


def buffers_of(layouts: tuple[ShardLayout, ...]) -> dict[int, int]:
    """Bytes of each block of memory that the copies lie in, by its address."""
    storages = [s.local.untyped_storage() for layout in layouts for s in layout if s.local.numel()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@st.composite
def locals_(draw) -> Tensor:
    tensor = random_bits(draw(shapes), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9)))
    how = draw(st.sampled_from(["as it is", "transposed", "every other", "part"]))
    if how == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.dim()))))
    if how == "every other":
        return tensor[..., ::2] if tensor.dim() else tensor
    return tensor[1:] if how == "part" and tensor.dim() else tensor


cases = st.lists(st.lists(st.tuples(locals_(), st.sampled_from([0, 0, 1])), max_size=6), max_size=3)


@given(cases, st.sampled_from([1, 40, 1 << 28]))
@examples(150)
def test_copies_are_the_bits_of_their_moment_in_no_more_memory_than_they_have(case, buffer_bytes: int) -> None:
    layouts = [tuple(shard_of(f"p{i}", local, replica) for i, (local, replica) in enumerate(one)) for one in case]
    copies = HostCopies(layouts)
    with mock.patch.object(staging, "BUFFER_BYTES", buffer_bytes):
        places = buffers_of(copies.take())
    for later in (10, 11):
        expected = [[bits(shard.local) for shard in layout] for layout in layouts]
        staged = copies.take()
        for layout in layouts:
            for shard in layout:  # what training does next
                shard.local.copy_(random_bits(tuple(shard.local.shape), shard.local.dtype, later))
        assert buffers_of(staged) == places, "the same memory each time"
        for live, held, wanted in zip(layouts, staged, expected, strict=True):
            for shard, copy, value in zip(live, held, wanted, strict=True):
                assert (copy.name, copy.global_shape, copy.boxes) == (shard.name, shard.global_shape, shard.boxes)
                assert (copy.kind, copy.replica, copy.holders) == (shard.kind, shard.replica, shard.holders)
                assert copy.local.dtype == shard.local.dtype and copy.current() is copy.local
                if shard.replica:
                    assert copy.local.numel() == 0
                else:
                    assert copy.local.shape == shard.local.shape and copy.local.is_contiguous()
                    assert bits(copy.local) == value
    stored = sum(s.local.nbytes for layout in layouts for s in layout if s.replica == 0)
    assert sum(places.values()) == copies.nbytes == stored


def test_one_buffer_serves_all_tensors_of_a_dtype_and_a_larger_one_has_its_own() -> None:
    sizes = [100, 100, 60, 300, 10, 0, 200]  # float32, so 4 bytes each
    layout = tuple(shard_of(f"p{i}", torch.ones(n)) for i, n in enumerate(sizes))
    mixed = (*layout, shard_of("half", torch.ones(7, dtype=torch.bfloat16)))
    assert sorted(buffers_of(HostCopies([mixed]).take()).values()) == [14, 4 * sum(sizes)]
    with mock.patch.object(staging, "BUFFER_BYTES", 4 * 260):
        cut = buffers_of(HostCopies([layout]).take())
    assert sorted(cut.values()) == sorted([4 * 260, 4 * 300, 4 * (10 + 0 + 200)])


def test_nothing_is_allocated_before_the_first_take_nor_after_it() -> None:
    layout = tuple(shard_of(f"p{i}", torch.ones(1000)) for i in range(3))
    with Allocations() as made:
        copies = HostCopies([layout])
    assert made.nbytes == 0
    with Allocations() as first:
        copies.take()
    assert first.nbytes == 3 * 4000
    with Allocations() as later:
        copies.take()
    assert later.nbytes == 0


def test_what_replaced_a_tensor_is_copied_and_what_differs_from_it_in_kind_is_refused() -> None:
    used = [torch.zeros(2, 3)]
    buffer = replace(shard_of("norm.mean", used[0]), current=lambda: used[0], kind="buffer")
    copies = HostCopies([(buffer,)])
    used[0] = torch.full((2, 3), 7.0)
    [[copy]] = copies.take()
    assert copy.local.tolist() == [[7.0] * 3] * 2
    for other in (torch.ones(2, 3, dtype=torch.float16), torch.ones(1, 3), torch.ones(3, 2)):
        used[0] = other
        with pytest.raises(OrderError, match=r"norm.mean: expected torch.float32 of shape \(2, 3\) on cpu .* found"):
            copies.take()
    assert copy.local.tolist() == [[7.0] * 3] * 2, "a refused take changes nothing"


def test_copies_of_parameters_need_no_gradients() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    [[copy]] = HostCopies([(shard_of("weight", parameter),)]).take()
    assert not copy.local.requires_grad and copy.local.tolist() == [1.0] * 3


def stored(root: Path, averages: dict[str, ShardLayout]) -> tuple[object, dict[str, bytes]]:
    """What a rank writes of some averages, and says of them: every file by its name."""
    part = write_part(open_folder(root), SnapshotRecord("run", "s", 0, 10.0, 1.0, ()), 0, averages)
    assert part.size > 0
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    return (part, squared_norms(tuple(averages.values()))), files


def test_a_snapshot_of_the_copies_is_that_of_the_averages_though_they_move_on(tmp_path: Path) -> None:
    live = (shard_of("a", torch.randn(4, 3)), shard_of("b", torch.randn(5)), shard_of("c", torch.randn(6), replica=1))
    averages = Averages(live, len(LABELS))
    averages.update_([0.5, 0.25])

    def by_label(layouts: tuple[ShardLayout, ...]) -> dict[str, ShardLayout]:
        return dict(zip(LABELS, layouts, strict=True))

    moving = tuple(averages.layout(index) for index in range(len(LABELS)))
    direct = stored(tmp_path / "direct", by_label(moving))
    staged = HostCopies(moving).take()
    averages.update_([1.0, 1.0])
    assert stored(tmp_path / "staged", by_label(staged)) == direct
