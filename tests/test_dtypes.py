"""Snapshots in fewer bits: what is stored, what comes back, what does not fit, and what can be rebuilt from them."""

from __future__ import annotations

import json
import math
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from allocations import Allocations
from builders import (
    LABELS,
    Free,
    averages_of,
    boxes_in,
    divided_models,
    examples,
    listing,
    new_run,
    new_session,
    no_flush,
    numbers,
    rows_of,
    same_bits,
    store,
    tensors_of,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from walks import walk_run

from sharded_phema import PostHocEMA, reconstruct
from sharded_phema.errors import ModelMismatch, StoreError, TargetError
from sharded_phema.folder import open_folder
from sharded_phema.movement import STEADY
from sharded_phema.per_tensor import whole_model
from sharded_phema.profile import Power
from sharded_phema.recipe import plan_rebuild
from sharded_phema.rounding import STORED_BYTES, UNIT_ROUNDOFF
from sharded_phema.source import noise_of, sources_of
from sharded_phema.store import names, open_run, tensors
from sharded_phema.store.dcp_reader import SnapshotReader
from sharded_phema.target import parse_target
from sharded_phema.tensorfile import DTYPES
from sharded_phema.width import gamma_of

# Torch says so of every save and load outside a process group.
pytestmark = pytest.mark.filterwarnings("ignore:.*single process")

dtypes = st.sampled_from(sorted(STORED_BYTES))
every_dtype = pytest.mark.parametrize("dtype", STORED_BYTES)
low_dtypes = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
HALVES = rows_of((4, 3), 1, 3)


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with no_flush():
        yield


def rounded(array: np.ndarray, dtype: str) -> Tensor:
    """Torch's own rounding, in the dtype."""
    return torch.from_numpy(np.asarray(array)).to(DTYPES[dtype][1])


def stored_run(root, division, dtype, averages):
    new_run(root, division, dtype=dtype)
    new_session(root, division)
    store(root, division, averages, t=10.0, dtype=dtype)
    return open_run(root).snapshots[0]


@examples(20)
@given(divided_models(), dtypes, st.integers(1, 7), st.sampled_from([1e-7, 1e-4, 1.0, 1e4]))
def test_stored_bits_are_torchs_rounding_in_any_chunks(division, dtype, chunk, scale):
    # Oracle: the safetensors library reads what torch's conversion gives. Small numbers are subnormal in float16.
    averages = {
        label: [np.asarray(np.float32(scale) * x) for x in xs] for label, xs in averages_of(division, 1).items()
    }
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "CHUNK", chunk)
        snapshot = stored_run(Path(folder), division, dtype, averages)
        alone = Path(folder) / "one rank's file"
        alone.mkdir()
        for rank in range(division.ranks):
            expected = {
                f"{label}.{parameter.name}:{number}": rounded(array[box.slices], dtype)
                for label, arrays in averages.items()
                for parameter, array, held in zip(division.parameters, arrays, division.held, strict=True)
                for number, box in enumerate(held[rank][0] if held[rank][1] == 0 else ())
            }
            path = Path(snapshot.root.url) / names.tensors_file(snapshot.name, rank)
            if not expected:
                assert not path.exists()
                continue
            path.rename(alone / path.name)
            found = tensors_of(alone)
            (alone / path.name).unlink()
            assert found.keys() == expected.keys()
            assert all(same_bits(found[key], expected[key]) for key in found)


@examples(20)
@given(divided_models(), dtypes, st.data())
def test_what_is_read_back_is_the_rounded_average_as_float32(division, dtype, data):
    # Oracle: numpy cuts torch's rounding; widening changes no value.
    with tempfile.TemporaryDirectory() as folder:
        averages = averages_of(division, 2)
        snapshot = stored_run(Path(folder), division, dtype, averages)
        for a, label in enumerate(LABELS):
            for p, array in enumerate(averages[label]):
                expected = rounded(array, dtype).float().numpy()
                box = data.draw(boxes_in(array.shape))
                np.testing.assert_array_equal(snapshot.read_box(a, p, box), expected[box.slices], strict=True)
                start, stop = sorted(data.draw(st.tuples(*[st.integers(0, array.size)] * 2)))
                found = snapshot.read_flat(a, p, start, stop)
                np.testing.assert_array_equal(found, expected.reshape(-1)[start:stop], strict=True)


@pytest.mark.parametrize("wanted", [torch.float32, torch.float64])
@every_dtype
def test_stock_dcp_load_fills_wider_tensors(tmp_path, dtype, wanted):
    averages = averages_of(HALVES, 3)
    snapshot = stored_run(tmp_path, HALVES, dtype, averages)
    state = {label: {"layer.0.weight": torch.full((4, 3), math.nan, dtype=wanted)} for label in LABELS}
    dcp.load(state, storage_reader=SnapshotReader(snapshot), no_dist=True)
    for label in LABELS:
        assert torch.equal(state[label]["layer.0.weight"], rounded(averages[label][0], dtype).to(wanted))


@every_dtype
def test_what_is_not_finite_is_stored_as_it_is(tmp_path, dtype):
    averages = {
        label: [np.full((4, 3), value, np.float32)] for label, value in zip(LABELS, (math.inf, math.nan), strict=True)
    }
    averages[LABELS[0]][0][0] = -math.inf
    snapshot = stored_run(tmp_path, HALVES, dtype, averages)
    for a, label in enumerate(LABELS):
        np.testing.assert_array_equal(snapshot.read_flat(a, 0, 0, 12), averages[label][0].reshape(-1))


def files_of(root):
    """Every file below a folder, with its bytes."""
    return {name: data for name, data in listing(root).items() if data is not None}


@pytest.mark.parametrize(
    ("dtype", "value", "told", "wider"),
    [
        ("float16", 7e4, "70000", "bfloat16 or float32"),
        ("float16", -65520.0, "65520", "bfloat16 or float32"),
        ("bfloat16", 3.4e38, "3.4e+38", "store float32"),
    ],
)
def test_a_number_that_does_not_fit_is_refused_by_name_and_training_goes_on(tmp_path, dtype, value, told, wider):
    model, root = Free(a=3, b=(2, 2)), tmp_path / "run"
    model.set(a=[1.0, 2.0, 3.0], b=[[1.0, 2.0], [3.0, 4.0]])
    with PostHocEMA(model, root, [0.05], dtype=dtype) as ema:
        ema.update()
        ema.snapshot()
        before = files_of(root)
        ema._averages.layout(0)[1].local[1, 0] = value
        # An infinity beside it is not what is named.
        ema._averages.layout(0)[1].local[0, 0] = math.inf
        ema.update(1.0 + 1e-12)
        with pytest.raises(
            StoreError, match=rf"\.b:0: its largest magnitude {told.replace('+', '.')} does not fit"
        ) as e:
            ema.snapshot()
        assert dtype in e.value.message
        assert wider in e.value.hint
        assert files_of(root) == before
        ema._averages.layout(0)[1].local.fill_(1.0)
        ema.update()
        ema.snapshot()
        run = open_run(root)
        assert ([s.t for s in run.snapshots], len(run.unfinished)) == ([1.0, pytest.approx(2.0)], 0)


def test_a_number_that_does_not_fit_on_one_rank_leaves_the_snapshot_unfiles_of(tmp_path):
    averages = averages_of(HALVES, 1)
    stored_run(tmp_path, HALVES, "float16", averages)
    before = files_of(tmp_path)
    averages[LABELS[1]] = [np.full((4, 3), 1e5, np.float32)]
    averages[LABELS[1]][0][0] = 1.0  # the row of rank 0
    store(tmp_path, HALVES, averages, t=20.0, number=1, ranks=[0], dtype="float16")
    with pytest.raises(StoreError, match=r"layer\.0\.weight:0: its largest magnitude 100000 does not fit float16"):
        store(tmp_path, HALVES, averages, t=20.0, number=1, ranks=[1], dtype="float16")
    run = open_run(tmp_path)
    assert ([s.t for s in run.snapshots], run.unfinished) == ([10.0], (names.snapshot_folder("s0", 1),))
    assert before.items() <= files_of(tmp_path).items()
    assert not list(tmp_path.rglob(".*")), "a temporary file stayed"


def test_the_largest_number_of_float16_fits(tmp_path):
    averages = {label: [np.full((4, 3), 65504.0, np.float32)] for label in LABELS}
    snapshot = stored_run(tmp_path, HALVES, "float16", averages)
    assert (snapshot.read_flat(0, 0, 0, 12) == 65504.0).all()


@pytest.mark.parametrize("dtype", ["float64", "half", "", None, torch.float16, ["float16"]])
def test_an_unknown_dtype_is_refused_before_anything_is_written_or_asked_of_others(tmp_path, monkeypatch, dtype):
    def asked(*_: Any) -> None:
        raise AssertionError("a collective came first")

    for name in ("assembly.agree", "assembly.map_model", "session.from_first"):
        monkeypatch.setattr(f"sharded_phema.{name}", asked)
    with pytest.raises(TargetError, match=r"dtype: expected one of float32, float16, bfloat16, found") as caught:
        PostHocEMA(Free(w=1), tmp_path / "run", dtype=dtype)
    assert "float32" in caught.value.hint
    assert listing(tmp_path) == {}


def test_a_run_continues_in_its_own_dtype_only(tmp_path):
    model = Free(w=3)
    model.set(w=[0.1, 0.2, 0.3])
    with PostHocEMA(model, tmp_path, dtype="float16") as ema:
        ema.update()
    before = listing(tmp_path)
    with pytest.raises(ModelMismatch, match=r"other dtype: expected float32 at position 0, found float16"):
        PostHocEMA(model, tmp_path)
    assert listing(tmp_path) == before
    assert json.loads((tmp_path / "run.json").read_text())["dtype"] == "float16"
    again = PostHocEMA(model, tmp_path, dtype="float16")
    assert again.resume() == 1.0
    for layout in again._averages_by_label().values():
        assert torch.equal(layout[0].local, model.w.detach().half().float())
        assert not torch.equal(layout[0].local, model.w)
    again.update()
    again.close()
    assert [snapshot.t for snapshot in open_run(tmp_path).snapshots] == [1.0, 2.0]


@low_dtypes
def test_the_checkpoint_of_a_run_that_stores_few_bits_keeps_all_bits(tmp_path, dtype):
    model = Free(w=3)
    model.set(w=[0.1, 0.2, 0.3])
    ema = PostHocEMA(model, tmp_path, dtype=dtype)
    ema.update()
    ema.snapshot()
    assert all(torch.equal(ema.state_dict()[label]["w"], model.w) for label in open_run(tmp_path).record.averages)


def test_a_record_with_an_unknown_dtype_is_refused(tmp_path):
    new_run(tmp_path, HALVES, dtype="float8")
    with pytest.raises(StoreError, match=r"run\.json: expected a dtype of float32, .* found float8"):
        open_run(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_file_of_another_dtype_than_the_records_is_refused(tmp_path, dtype):
    # bfloat16 has the length of float16; only the header tells them apart.
    new_run(tmp_path, HALVES, dtype="float16")
    new_session(tmp_path, HALVES)
    store(tmp_path, HALVES, averages_of(HALVES, 1), t=10.0, dtype=dtype)
    with pytest.raises(StoreError, match=rf"in F16, found .* bytes of {DTYPES[dtype][0]}") as caught:
        open_run(tmp_path).snapshots[0].read_flat(0, 0, 0, 12)
    assert "rank-00000.safetensors" in caught.value.message


@every_dtype
def test_nothing_made_while_writing_is_longer_than_a_chunk(tmp_path, dtype):
    # Oracle: counting, of torch's tensors and of Python's memory. 12 MB in one tensor; float32 is not copied at all.
    (values,), folder = numbers([(1500, 2001)], 1), open_folder(tmp_path)
    with Allocations():  # the first time, torch loads modules of its own
        tensors.write_tensors(folder, "first", {"w:0": torch.ones(1)}, {"w:0": dtype}, {})
    with Allocations() as made:
        tracemalloc.start()
        tensors.write_tensors(folder, "file", {"w:0": torch.from_numpy(values)}, {"w:0": dtype}, {})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 10**6
    assert made.nbytes <= (0 if dtype == "float32" else 2 * tensors.CHUNK)
    assert same_bits(tensors_file(tmp_path / "file")["w:0"], rounded(values, dtype))


def tensors_file(path: Path) -> dict[str, Tensor]:
    path.rename(path.with_suffix(".safetensors"))
    return tensors_of(path.parent)


@every_dtype
def test_a_snapshot_takes_the_bytes_of_its_dtype_and_a_plan_reads_them(tmp_path, dtype):
    walk = walk_run(tmp_path, dtype=dtype)
    numel, width = walk.run.numel, STORED_BYTES[dtype]
    for snapshot in walk.run.snapshots:
        numbers_only = snapshot.size - len(LABELS) * numel * width
        assert 0 < numbers_only < 2000, "the header"
    plan = plan_rebuild(walk.run, [whole_model(parse_target("0.15"))], tolerance="exact")
    assert plan.bytes_to_read == len(plan.sources) * numel * width


@low_dtypes
def test_noise_is_that_of_the_dtype(tmp_path, dtype):
    wide, low = walk_run(tmp_path / "wide").run, walk_run(tmp_path / "low", dtype=dtype).run
    share = (UNIT_ROUNDOFF[dtype] / UNIT_ROUNDOFF["float32"]) ** 2
    expected = [share * noise for noise in noise_of(sources_of(wide), STEADY)]
    assert min(expected) > 0.0
    assert noise_of(sources_of(low), STEADY) == pytest.approx(expected, rel=1e-12)


@low_dtypes
def test_the_error_of_a_rebuilt_narrow_average_is_the_forecast_rounding_included(tmp_path, dtype):
    # Oracle: the walk's own average in float64. Coefficients of 0.03 are large, so that rounding is most of its error.
    walk = walk_run(tmp_path / "run", dtype=dtype)
    plan = reconstruct(walk.run.root, ["0.03"], out=tmp_path / "out", tolerance="exact")
    found = torch.cat([t.reshape(-1) for _, t in sorted(tensors_of(tmp_path / "out" / "0.03").items())])
    error = walk.error(found.double().numpy(), Power(gamma_of(0.03), walk.run.snapshots[-1].t, 1.0))
    fit = plan.targets[0].fit
    assert fit.rounding_part > 0.3 * fit.forecast
    assert fit.forecast / 3.0 < error < 3.0 * fit.forecast


@low_dtypes
def test_averages_tracked_by_training_are_rebuilt_within_the_forecast(tmp_path, dtype):
    # Oracle: the wanted average, tracked beside them and stored in float32.
    model = Free(w=2000)
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(2000, generator=generator)
    ema = PostHocEMA(model, tmp_path / "run", snapshot_every=20, dtype=dtype)
    truth = PostHocEMA(model, tmp_path / "truth", [0.03], snapshot_every=400)
    for _ in range(400):
        weights = weights + 0.01 * torch.randn(2000, generator=generator)
        model.set(w=weights)
        ema.update()
        truth.update()
    plan = reconstruct(tmp_path / "run", ["0.03"], out=tmp_path / "out")
    tracked = torch.from_numpy(open_run(tmp_path / "truth").snapshots[-1].read_flat(0, 0, 0, 2000))
    rebuilt = tensors_of(tmp_path / "out" / "0.03")["w"]
    error = float((rebuilt - tracked).norm() / (weights - tracked).norm())
    assert plan.targets[0].fit.forecast / 3.0 < error < 3.0 * plan.targets[0].fit.forecast
