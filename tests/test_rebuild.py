from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import Free, examples, listing, no_flush, same_bits, tensors_of
from hypothesis import given
from hypothesis import strategies as st

from sharded_phema import grid
from sharded_phema.errors import ForecastError, OrderError, OutputError, PhemaError, StoreError, TargetError
from sharded_phema.per_tensor import parse_outputs
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct
from sharded_phema.recipe import plan_rebuild
from sharded_phema.store import open_run
from sharded_phema.target import parse_target

SIZE, STEPS, EVERY = 3000, 800, 100
WIDTHS = (0.07, 0.15, 0.20, 0.25)
OTHERS = ("decay:linear:0.2", "decay:cosine:0.4", "window:0.2", "exponential:tau=150")
MODEL = {"layer_weight": (50, 58), "bias": 99, "scale": (), "none": (0, 4)}


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with no_flush():
        yield


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A run on weights that walk randomly: its folder, the trajectory, and four widths that were tracked directly."""
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.standard_normal((STEPS, SIZE)), axis=0).astype(np.float32)
    model, folder = Free(**MODEL), tmp_path_factory.mktemp("walk")
    ema = PostHocEMA(model, folder / "run", snapshot_every=EVERY)
    direct = PostHocEMA(model, folder / "direct", WIDTHS, snapshot_every=STEPS)
    for row in path:
        model.set(**split(row))
        ema.update()
        direct.update()
    return SimpleNamespace(root=folder / "run", path=path, direct=flat_averages(folder / "direct", STEPS))


def split(row):
    """A flat vector as the model's parameters, and back."""
    values, start = {}, 0
    for name, shape in MODEL.items():
        size = math.prod(shape) if isinstance(shape, tuple) else shape
        values[name] = row[start : start + size].reshape(shape)
        start += size
    return values


def joined(tensors):
    return np.concatenate([np.asarray(tensors[name], dtype=np.float64).ravel() for name in MODEL])


def flat_averages(root, t):
    """Every average stored at a time, read with the safetensors library, by label."""
    (snapshot,) = [snapshot for snapshot in open_run(root).snapshots if snapshot.t == t]
    tensors = tensors_of(snapshot.where)
    return {label: joined({name: tensors[f"{label}.{name}:0"] for name in MODEL}) for label in snapshot.record.averages}


def truth(path, text, t=float(STEPS)):
    """The average that a target denotes, from the trajectory: its weights are differences of its own cumulative."""
    steps = np.arange(len(path) + 1, dtype=np.float64)
    weights = np.diff(parse_target(text).profile(t, 1.0).cumulative(steps))
    return weights @ path.astype(np.float64)


def relative_error(found, expected, path, t=STEPS):
    return np.linalg.norm(found - expected) / np.linalg.norm(path[t - 1] - expected)


@pytest.fixture(scope="module")
def rebuilt(walk, tmp_path_factory):
    out = tmp_path_factory.mktemp("rebuilt") / "out"
    return SimpleNamespace(out=out, plan=reconstruct(walk.root, [*WIDTHS, *OTHERS], out=out, precision="float64"))


@pytest.fixture(scope="module")
def in_float32(walk, tmp_path_factory):
    out = tmp_path_factory.mktemp("float32") / "out"
    return SimpleNamespace(out=out, plan=reconstruct(walk.root, [*WIDTHS, *OTHERS], out=out))


@pytest.mark.parametrize("text", [*WIDTHS, *OTHERS])
def test_sums_in_float32_are_those_in_float64_up_to_the_rounding_of_each_term(walk, rebuilt, in_float32, text):
    # Oracle: the sum in float64, and the bound on a sum of n products of rounded factors in any order: each is rounded
    # at most n + 1 times by 2^-24 of the sum of magnitudes.
    index, planned = planned_of(in_float32.plan, text)
    terms = [
        (c, flat_averages(walk.root, source.snapshot.t)[source.snapshot.record.averages[source.average]])
        for source, c in zip(in_float32.plan.sources, in_float32.plan.coefficients[:, index], strict=True)
        if c != 0.0
    ]
    exact = sum(c * values for c, values in terms)
    bound = (len(terms) + 2) * 2.0**-24 * sum(abs(c) * np.abs(values) for c, values in terms)
    found = joined(tensors_of(in_float32.out / planned.target.slug))
    assert (np.abs(found - exact) <= bound).all()


def planned_of(plan, text):
    (index,) = [k for k, planned in enumerate(plan.targets) if planned.target.text == parse_target(text).text]
    return index, plan.targets[index]


@pytest.mark.parametrize("text", [*WIDTHS, *OTHERS])
def test_a_rebuilt_average_is_the_float64_sum_of_the_stored_ones_rounded_once(walk, rebuilt, text):
    # Oracle: the sum in the order of the plan, product before sum, over averages that the safetensors library reads.
    index, planned = planned_of(rebuilt.plan, text)
    total = np.zeros(SIZE)
    for source, row in zip(rebuilt.plan.sources, rebuilt.plan.coefficients, strict=True):
        if row[index] != 0.0:
            label = source.snapshot.record.averages[source.average]
            total += row[index] * flat_averages(walk.root, source.snapshot.t)[label]
    found = tensors_of(rebuilt.out / planned.target.slug)
    for name, expected in split(total).items():
        assert same_bits(found[name], torch.from_numpy(np.asarray(expected)).float())


@pytest.mark.parametrize("text", [*WIDTHS, *OTHERS])
def test_the_error_on_a_random_walk_is_what_was_forecast(walk, rebuilt, text):
    # Oracle: the trajectory itself in float64. The forecast is the expected error of a random walk; 3000 independent
    # walks meet it to a few per cent, steps of 1 / 800 and rounding of float32 averages cost less than the rest.
    _, planned = planned_of(rebuilt.plan, text)
    found = joined(tensors_of(rebuilt.out / planned.target.slug))
    actual = relative_error(found, truth(walk.path, text), walk.path)
    assert 0.5 <= actual / planned.fit.forecast <= 2.0


@pytest.mark.parametrize("sigma_rel", WIDTHS)
def test_the_oracle_agrees_with_the_width_tracked_directly(walk, sigma_rel):
    # 800 float32 updates of numbers up to 100, each rounded to 6e-8 of them, forgotten as the average moves on.
    label = f"power:gamma={parse_target(sigma_rel).profile(1.0).gamma!r}"
    np.testing.assert_allclose(walk.direct[label], truth(walk.path, sigma_rel), rtol=0, atol=1e-3)


@pytest.mark.parametrize("t", [450, 437.5, 100, 700])
def test_a_target_in_the_middle_of_the_run_is_rebuilt_as_of_then(walk, tmp_path, t):
    text = f"0.2@t={t:g}"
    plan = reconstruct(walk.root, [text], out=tmp_path / "out")
    horizon = math.ceil(t / EVERY) * EVERY
    assert max(source.snapshot.t for source in plan.sources) <= horizon
    found = joined(tensors_of(tmp_path / "out" / plan.targets[0].target.slug))
    expected = truth(walk.path, text, t)
    actual = relative_error(found, expected, walk.path, int(t))
    # Half a step beyond the last one, raw weights are one step old: of no weight beside a width of 0.2 * 437.
    assert 0.4 <= actual / plan.targets[0].fit.forecast <= 2.5


@pytest.mark.parametrize("t", [100, 500, 800])
@pytest.mark.parametrize("sigma_rel", [0.05, 0.10])
def test_a_stored_average_comes_out_bit_for_bit(walk, tmp_path, sigma_rel, t):
    plan = reconstruct(walk.root, [f"{sigma_rel}@t={t}"], out=tmp_path / "out")
    assert plan.targets[0].fit.fit_part == 0.0
    assert plan.targets[0].fit.forecast == plan.targets[0].fit.rounding_part < 1e-6  # of float32, as stored
    assert [source.snapshot.t for source in plan.sources] == [t]
    stored = flat_averages(walk.root, t)[list(plan.run.record.averages)[[0.05, 0.10].index(sigma_rel)]]
    found = tensors_of(tmp_path / "out" / plan.targets[0].target.slug)
    for name, expected in split(stored).items():
        assert same_bits(found[name], torch.from_numpy(np.asarray(expected)).float())


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("block", [37, 500, 2900, 3001])
def test_the_size_of_blocks_does_not_show_in_the_bits(
    walk, rebuilt, in_float32, tmp_path, monkeypatch, block, precision
):
    # The targets of one call share their sources, so that both calls name the same ones.
    texts = [*WIDTHS, *OTHERS]
    monkeypatch.setattr(grid, "BLOCK", block)
    reconstruct(walk.root, texts, out=tmp_path / "out", precision=precision)
    expected = (rebuilt if precision == "float64" else in_float32).out
    for text in texts:
        file = Path(parse_target(text).slug) / "model.safetensors"
        same = (tmp_path / "out" / file).read_bytes() == (expected / file).read_bytes()
        assert same, text  # the bytes themselves would take minutes to show


@pytest.mark.parametrize("workers", [2, 3, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_workers_one_after_another_write_the_bytes_of_one(walk, tmp_path, monkeypatch, workers, dtype):
    monkeypatch.setattr(grid, "BLOCK", 100)
    options = {"dtype": dtype, "max_shard_size": 9000}
    reconstruct(walk.root, [0.15, "window:0.2"], out=tmp_path / "one", **options)
    for worker in reversed(range(workers)):
        assert not (tmp_path / "many").exists()
        plan = reconstruct(
            walk.root, [0.15, "window:0.2"], out=tmp_path / "many", worker=worker, workers=workers, **options
        )
        assert plan.summary.finished == (worker == 0)
    one = listing(tmp_path / "one")
    assert sum(name.endswith(".safetensors") for name in one) == 2 * (1 if dtype == "bfloat16" else 2)
    assert listing(tmp_path / "many") == one
    assert json.loads(one["0.15/phema.json"])["dtype"] == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_low_precision_output_is_rounded_from_the_float64_sum(walk, tmp_path, dtype):
    plan = reconstruct(walk.root, [0.15], out=tmp_path / "low", dtype=dtype, precision="float64")
    total = np.zeros(SIZE)
    for source, (weight,) in zip(plan.sources, plan.coefficients, strict=True):
        total += weight * flat_averages(walk.root, source.snapshot.t)[plan.run.record.averages[source.average]]
    found = tensors_of(tmp_path / "low" / "0.15")
    for name, expected in split(total).items():
        assert same_bits(found[name], torch.from_numpy(np.asarray(expected)).to(getattr(torch, dtype)))


def test_the_recipe_says_what_was_made_and_its_sources_exist(walk, rebuilt):
    run = open_run(walk.root)
    times = {snapshot.t for snapshot in run.snapshots}
    for text in [*WIDTHS, *OTHERS]:
        _, planned = planned_of(rebuilt.plan, text)
        recipe = json.loads((rebuilt.out / planned.target.slug / "phema.json").read_text())
        assert (recipe["run"], recipe["unit"], recipe["t"]) == (run.record.run, "steps", STEPS)
        assert parse_target(recipe["target"]) == parse_target(text)
        assert (recipe["dtype"], recipe["metric"]) == ("float32", "trajectory")
        assert recipe["forecast"] == planned.fit.forecast
        coefficients = [source["coefficient"] for source in recipe["sources"]]
        assert math.fsum(coefficients) == pytest.approx(1.0, abs=1e-12)
        assert recipe["noise_gain"] == pytest.approx(math.fsum(map(abs, coefficients)), rel=1e-12)
        assert all(s["t"] in times and s["average"] in run.record.averages for s in recipe["sources"])


def test_every_target_has_a_folder_and_the_plan_counts_what_is_read(walk, rebuilt):
    slugs = {parse_target(text).slug for text in [*WIDTHS, *OTHERS]}
    assert {path.name for path in rebuilt.out.iterdir()} == slugs
    assert all(
        sorted(p.name for p in (rebuilt.out / s).iterdir()) == ["model.safetensors", "phema.json"] for s in slugs
    )
    assert rebuilt.plan.bytes_to_read == 4 * SIZE * len(rebuilt.plan.sources)


def test_progress_is_given_the_bytes_of_each_step_and_the_steps(walk, tmp_path, monkeypatch):
    # Oracle: 3000 elements of 4 bytes, in blocks of 1100, of each source that is read and of what is written.
    monkeypatch.setattr(grid, "BLOCK", 1100)
    seen = []

    def bar(sizes, steps):
        seen.append(list(sizes))
        for size, step in zip(sizes, steps, strict=True):
            seen.append((size, step))
            yield step

    plan = reconstruct(walk.root, [0.15], out=tmp_path / "out", progress=bar)
    sizes = [4 * numel * (len(plan.sources) + 1) for numel in (1100, 1100, 800)]
    assert seen == [sizes, *zip(sizes, range(3), strict=True)]


def test_a_bar_that_asks_for_no_more_than_the_known_steps_does_not_leave_the_last_ones_unfinished(walk, tmp_path):
    # Without strict, zip never asks the steps whether there is more, and what follows the last one would not run.
    def bar(sizes, steps):
        return (step for _, step in zip(sizes, steps, strict=False))

    plan = reconstruct(walk.root, [0.15], out=tmp_path / "out", progress=bar)
    assert plan.summary.finished and (tmp_path / "out" / "0.15" / "model.safetensors").is_file()


BAD = [
    (["nonsense"], {}, TargetError, "neither a width nor a kind"),
    (["gauss:3"], {}, TargetError, "unknown kind"),
    ([], {}, TargetError, "no target"),
    (["0.1", 0.10], {}, TargetError, "twice"),
    ([0.0], {}, TargetError, "sigma_rel"),
    ([-0.1], {}, TargetError, "sigma_rel"),
    ([0.29], {}, TargetError, "sigma_rel"),
    (["nan"], {}, TargetError, "nan"),
    (["0.15@t=99"], {}, TargetError, "outside the snapshots"),
    (["0.15@t=801"], {}, TargetError, "outside the snapshots"),
    (["0.15@t=0"], {}, TargetError, "above 0"),
    (["0.15", "0.2@t=1e9"], {}, TargetError, "span steps 100 to 800"),
    (["0.15"], {"dtype": "float64"}, OutputError, "float64"),
    (["0.15"], {"format": "pickle"}, OutputError, "pickle"),
    (["0.15"], {"max_shard_size": "0GB"}, OutputError, "size"),
    (["0.15"], {"metric": "wish"}, TargetError, "wish"),
    (["decay:sqrt:0.2"], {"metric": "density"}, TargetError, "density"),
    (["0.15"], {"tolerance": 1e-9}, ForecastError, "1e-09"),
    (["0.15"], {"tolerance": math.nan}, PhemaError, "nan"),
    (["0.15"], {"precision": "float16"}, TargetError, "found 'float16'"),
    (["0.15"], {"memory": "1MB"}, TargetError, "need at least"),
    (["0.15"], {"memory": "lots"}, OutputError, "found 'lots'"),
    (["0.15"], {"device": "abacus"}, TargetError, "abacus"),
    (["0.15"], {"like": "/nowhere/at/all"}, OutputError, "config.json"),
    (["0.15"], {"leave_out": ["nonesuch"]}, TargetError, "holds no such snapshot"),
    (["0.15"], {"worker": 2, "workers": 2}, OrderError, "worker 2 of 2"),
    (["0.15"], {"worker": 0}, OrderError, "worker 0 of None"),
    (["0.15"], {"workers": 2}, OrderError, "worker None of 2"),
    (["0.15"], {"worker": -1, "workers": 2}, OrderError, "worker -1 of 2"),
    (["0.15"], {"worker": 0, "workers": 0}, OrderError, "worker 0 of 0"),
]


@pytest.mark.parametrize(("targets", "options", "kind", "text"), BAD, ids=[f"{b[0]}{b[1]}" for b in BAD])
def test_what_cannot_be_rebuilt_is_one_error_with_a_hint_and_nothing_is_written(
    walk, tmp_path, targets, options, kind, text
):
    before = listing(walk.root)
    with pytest.raises(kind) as caught:
        reconstruct(walk.root, targets, out=tmp_path / "out", **options)
    assert text in caught.value.message
    assert caught.value.hint
    assert listing(tmp_path) == {}
    assert listing(walk.root) == before


def test_a_forecast_above_the_tolerance_names_both_numbers(walk):
    run, outputs = open_run(walk.root), parse_outputs(["0.15"])
    forecast = plan_rebuild(run, outputs, tolerance="exact").targets[0].fit.forecast
    assert plan_rebuild(run, outputs, tolerance=1.01 * forecast).targets[0].fit.forecast <= 1.01 * forecast
    with pytest.raises(ForecastError) as caught:
        plan_rebuild(run, parse_outputs(["0.1", "0.15"]), tolerance=forecast / 2)
    assert f"0.15: forecast error {forecast:.2g}" in caught.value.message
    assert f"{forecast / 2:g}" in caught.value.message
    assert "8 snapshots" in caught.value.message
    assert "--tolerance" in caught.value.hint


@pytest.mark.parametrize("taken", ["file", "folder"])
def test_an_output_that_is_taken_is_refused_and_untouched(walk, tmp_path, taken):
    out = tmp_path / "out"
    if taken == "folder":
        out.mkdir()
        (out / "precious").write_text("keep")
    else:
        out.write_text("keep")
    before = listing(tmp_path)
    with pytest.raises(OutputError, match="nothing is ever overwritten") as caught:
        reconstruct(walk.root, [0.15], out=out)
    assert caught.value.hint
    assert listing(tmp_path) == before


def test_no_run_folder_and_no_snapshots_are_one_error_each(tmp_path):
    PostHocEMA(Free(w=3), tmp_path / "empty")
    before = listing(tmp_path)
    for root, text in ((tmp_path / "none", "is no run folder"), (tmp_path / "empty", "no finished snapshot")):
        with pytest.raises(StoreError, match=text) as caught:
            reconstruct(root, [0.15], out=tmp_path / "out")
        assert caught.value.hint
    assert listing(tmp_path) == before


def test_weights_that_the_dtype_cannot_hold_fail_with_the_parameters_name_and_leave_nothing(tmp_path):
    model = Free(fine=3, huge=3)
    with PostHocEMA(model, tmp_path / "run", snapshot_every=2) as ema:
        for _ in range(4):
            model.set(huge=1e6)
            ema.update()
    before = listing(tmp_path)
    with pytest.raises(OutputError, match=r"huge: .* does not fit float16") as caught:
        reconstruct(tmp_path / "run", [0.15], out=tmp_path / "out", dtype="float16")
    assert caught.value.hint
    assert listing(tmp_path) == before


def spoil(path):
    """Change the last byte, which no length tells."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("harm", [spoil, Path.unlink, lambda path: os.truncate(path, path.stat().st_size - 4)])
def test_a_damaged_snapshot_is_left_out_and_the_others_give_what_they_can(tmp_path, harm):
    # Oracle: the run without that snapshot.
    model = Free(w=30)
    with PostHocEMA(model, tmp_path / "run", snapshot_every=2) as ema:
        for step in range(8):
            model.set(w=torch.arange(30.0) * step)
            ema.update()
    victim = open_run(tmp_path / "run").snapshots[1]
    shutil.copytree(tmp_path / "run", tmp_path / "less")
    shutil.rmtree(tmp_path / "less" / victim.name)
    harm(Path(victim.where) / "rank-00000.safetensors")
    plan = reconstruct(tmp_path / "run", [0.15], out=tmp_path / "out", tolerance="exact")
    expected = reconstruct(tmp_path / "less", [0.15], out=tmp_path / "expected", tolerance="exact")
    assert [damaged.name for damaged in plan.run.damaged] == [victim.name]
    assert victim.t not in [source.snapshot.t for source in plan.sources]
    assert plan.targets[0].fit.forecast == expected.targets[0].fit.forecast
    for name, tensor in tensors_of(tmp_path / "expected" / "0.15").items():
        assert same_bits(tensors_of(tmp_path / "out" / "0.15")[name], tensor)


def test_a_run_all_of_whose_snapshots_are_damaged_fails_and_leaves_nothing(tmp_path):
    model = Free(w=30)
    with PostHocEMA(model, tmp_path / "run", snapshot_every=2) as ema:
        for _ in range(6):
            ema.update()
    for snapshot in open_run(tmp_path / "run").snapshots:
        spoil(Path(snapshot.where) / "rank-00000.safetensors")
    before = listing(tmp_path)
    with pytest.raises(StoreError, match=r"rank-00000\.safetensors is damaged between bytes"):
        reconstruct(tmp_path / "run", [0.15], out=tmp_path / "out")
    assert listing(tmp_path) == before


@examples(10)
@given(st.integers(1, 9), st.integers(2, 5), st.integers(0, 6))
def test_weights_that_stand_still_are_rebuilt_as_they_are(every, count, start):
    # Oracle: any average of a constant is the constant. Coefficients sum to 1 to rounding times their size; in float32
    # each of n of them, its product and its sum are rounded, by 2^-24 of the magnitudes at most.
    model = Free(w=5)
    with tempfile.TemporaryDirectory() as folder:
        ema = PostHocEMA(model, Path(folder) / "run", snapshot_every=every, start=start)
        for _ in range(every * count + start):
            model.set(w=[1.0, -2.0, 3.5, 1e-3, 1e6])
            ema.update()
        for precision in ("float64", "float32"):
            out = Path(folder) / precision
            plan = reconstruct(Path(folder) / "run", [0.07, 0.2], out=out, precision=precision)
            unit = 1e-7 if precision == "float64" else (len(plan.sources) + 2) * 2.0**-24
            for planned in plan.targets:
                found = tensors_of(out / planned.target.slug)["w"]
                tolerance = unit * max(1.0, planned.fit.noise_gain)
                np.testing.assert_allclose(found, [1.0, -2.0, 3.5, 1e-3, 1e6], rtol=tolerance)
