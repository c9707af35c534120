from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from builders import Free, listing, no_flush, same_bits, tensors_of
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sharded_phema.errors import ModelMismatch, OrderError, TargetError
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct
from sharded_phema.recipe import sources_of
from sharded_phema.store import open_run
from sharded_phema.tables import show_info
from sharded_phema.tracked import tracked_set

# Torch says so of every save and load outside a process group.
pytestmark = pytest.mark.filterwarnings("ignore:.*single process")

KINDS = (
    "0.1",
    "power:gamma=2",
    "exponential:decay=0.97",
    "exponential:halflife=20,ramp=0.1",
    "exponential:halflife=80,ramp=0.05",
    "exponential:tau=30,corrected",
    "exponential:tau=30,corrected,start=170",
    "uniform",
    "uniform:start=170",
)


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with no_flush():
        yield


def every(step, count, begin=0.0):
    return [begin + step * k for k in range(1, count + 1)]


# Times at which the averages are updated, and the start that PostHocEMA is given.
RHYTHMS = {
    "every step": (every(1, 400), 0),
    "every 10 steps": (every(10, 40), 0),
    "every 100 steps": (every(100, 5), 0),
    "batch of 4, then of 13 samples": ([*every(4, 40), *every(13, 20, begin=160)], 0),
    "fractions": (every(0.7, 500), 0),
    "start at 150": (every(1, 250, begin=149), 150),
    "start at 150, every 10 steps": (every(10, 26, begin=140), 150),
}


def realised(folder, texts, times, start=0, resume_after=None):
    """Weight of each moment's parameters in each average: a trajectory that is a different axis at every moment."""

    def make():
        model = Free(w=len(times))
        return model, PostHocEMA(model, folder, snapshot_every=1e9, start=start, profiles=texts)

    model, ema = make()
    for k, t in enumerate(times):
        model.set(w=np.eye(1, len(times), k)[0])
        ema.update(t)
        if k == resume_after:
            ema.close()
            model, ema = make()
            assert ema.resume() == t
    ema.close()
    (snapshot,) = open_run(folder).snapshots[-1:]
    found = [
        snapshot.read_box(a, 0, snapshot.layout.averaged(0)[0][1][0]) for a in range(len(snapshot.record.averages))
    ]
    profiles = [source.profile for source in sources_of(open_run(folder))[-len(found) :]]
    return np.array(found, dtype=np.float64), profiles


def increments(profile, times):
    # What lies before the first weights is on them.
    return np.diff(profile.cumulative(np.array([-1.0, *times])))


def assert_shares(found, expected):
    # Each update rounds to float32, 6e-8 relative, and so does the weight of the update.
    np.testing.assert_allclose(found, expected, rtol=2e-7 * (len(expected) + 1), atol=2e-7)


@pytest.mark.parametrize("name", RHYTHMS)
@pytest.mark.parametrize("resume", [False, True], ids=["in one go", "resumed"])
def test_every_kind_realises_the_profile_that_its_record_says(tmp_path, name, resume):
    # Oracle: increments of the profile that recipe reads off the record, between the times of the updates.
    times, start = RHYTHMS[name]
    found, profiles = realised(tmp_path / "run", KINDS, times, start, resume_after=len(times) // 3 if resume else None)
    for shares, profile in zip(found, profiles, strict=True):
        assert profile.t == times[-1]
        assert_shares(shares, increments(profile, times))


def test_the_weights_of_all_updates_telescope_to_the_profile():
    # Oracle: the same increments, to the rounding of float64 over a million steps of time in uneven strides.
    times = np.cumsum(np.random.default_rng(0).integers(1, 200, size=10_000)).astype(float)
    tracked = tracked_set(KINDS, 0.0)
    shares = np.zeros((len(KINDS), len(times)))
    shares[:, 0] = 1.0
    for k, (last, t) in enumerate(pairwise(times.tolist()), start=1):
        entering = np.array(tracked.entering(times[0], last, t))
        shares *= (1.0 - entering)[:, None]
        shares[:, k] = entering
    for target, found in zip(tracked.targets, shares, strict=True):
        expected = increments(target.profile(times[-1], times[0]), times)
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


def weights_at(step):
    return torch.sin(torch.arange(50.0) * (1 + step / 30)) + step / 100


def tracked_weights(folder, texts, steps, **options):
    model = Free(w=50)
    ema = PostHocEMA(model, folder, snapshot_every=1e9, profiles=texts, **options)
    for step in range(1, steps + 1):
        model.set(w=weights_at(step))
        ema.update()
    found = []
    for text in texts:
        with ema.swapped(text):
            found.append(model.w.detach().double().clone())
    return found


def close(found, expected):
    # Each float32 update rounds by up to 1.2e-7 of the numbers, and later updates forget most of it.
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=3e-6)


def test_a_constant_decay_is_that_of_torch(tmp_path):
    # Oracle: AveragedModel with get_ema_multi_avg_fn, in float64.
    (found,) = tracked_weights(tmp_path / "run", ["exponential:decay=0.99"], 500)
    model = Free(w=50, dtype=torch.float64)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for step in range(1, 501):
        model.set(w=weights_at(step))
        average.update_parameters(model)
    close(found, average.module.w.detach())


def test_decay_9999_is_a_plain_loop(tmp_path):
    (found,) = tracked_weights(tmp_path / "run", ["exponential:decay=0.9999"], 500)
    expected = weights_at(1).double()
    for step in range(2, 501):
        expected = 0.9999 * expected + 0.0001 * weights_at(step).double()
    close(found, expected)


def test_a_corrected_average_is_that_of_adam(tmp_path):
    # Oracle: the first moment of Adam: zeros at first, divided by 1 - decay^n at the end.
    (found,) = tracked_weights(tmp_path / "run", ["exponential:decay=0.999,corrected"], 500)
    moment = torch.zeros(50, dtype=torch.float64)
    for step in range(1, 501):
        moment = 0.999 * moment + 0.001 * weights_at(step).double()
    close(found, moment / (1 - 0.999**500))


def test_a_uniform_average_is_the_mean_of_all_weights_since_its_start(tmp_path):
    texts = ["uniform", "uniform:start=300"]
    for found, first in zip(tracked_weights(tmp_path / "run", texts, 500), (1, 301), strict=True):
        close(found, torch.stack([weights_at(step).double() for step in range(first, 501)]).mean(0))


def test_a_uniform_average_of_a_run_that_starts_late_counts_from_there(tmp_path):
    # Oracle: torch.mean of the weights after the start, which is what the record says.
    (found,) = tracked_weights(tmp_path / "run", ["uniform"], 500, start=200)
    close(found, torch.stack([weights_at(step).double() for step in range(201, 501)]).mean(0))


def test_a_ramped_average_is_the_published_rule(tmp_path):
    # Oracle: the rule of StyleGAN2-ADA and EDM, half-life min(limit, ramp * images so far), at a batch of 10. It holds
    # a half-life through a step where ours grows, which matters to the first weights: by now they weigh 1e-17.
    limit, ramp, batch = 400.0, 0.05, 10
    model = Free(w=50)
    ema = PostHocEMA(
        model,
        tmp_path / "run",
        snapshot_every=1e9,
        unit="images",
        profiles=[f"exponential:halflife={limit},ramp={ramp}"],
    )
    expected = None
    for step in range(1, 1501):
        model.set(w=weights_at(step))
        ema.update(step * batch)
        decay = 0.5 ** (batch / min(limit, ramp * step * batch))
        now = weights_at(step).double()
        expected = now if expected is None else decay * expected + (1 - decay) * now
    with ema.swapped(f"exponential:halflife={limit},ramp={ramp}"):
        close(model.w.detach().double(), expected)


def test_decays_are_corrected_for_update_interval_and_batch_size(tmp_path):
    # Oracle: the average of every step. Weights that move slowly look the same at every tenth step, so that a decay
    # that ignored the interval would be off by most of the lag, 70 steps of 0.01 each.
    def drift(name, batch, update_every, decay):
        model = Free(w=1)
        ema = PostHocEMA(
            model, tmp_path / name, snapshot_every=1e9, update_every=update_every, profiles=[f"exponential:{decay}"]
        )
        for step in range(1, 1001):
            model.set(w=[step / 100])
            ema.update(step * batch)
        with ema.swapped(f"exponential:{decay}"):
            return model.w.item()

    truth = drift("steps", 1, 0, "decay=0.99")
    assert truth == pytest.approx(10.0 - 0.99, abs=0.01)
    assert drift("every 10 steps", 1, 10, "decay=0.99") == pytest.approx(truth, abs=0.06)
    assert drift("samples", 32, 0, f"decay={0.99 ** (1 / 32)}") == pytest.approx(truth, abs=1e-5)
    assert drift("samples, every 10 steps", 32, 320, f"tau={-32 / math.log(0.99)}") == pytest.approx(truth, abs=0.06)


def test_widths_and_profiles_are_tracked_together_in_order(tmp_path):
    def labels(name, **options):
        PostHocEMA(Free(w=1), tmp_path / name, **options)
        return open_run(tmp_path / name).record.averages

    powers = [tracked_set([width], 0.0).labels[0] for width in (0.05, 0.10, 0.2)]
    assert labels("default") == (powers[0], powers[1])
    assert labels("profiles", profiles=["uniform", 0.2]) == ("power:gamma=0", powers[2])
    assert labels("both", sigma_rels=[0.05], profiles=["exponential:tau=9"]) == (powers[0], "exponential:tau=9")
    assert labels("late", start=40, profiles=["uniform", "exponential:tau=9,corrected"]) == (
        "uniform:start=40",
        "exponential:tau=9,corrected,start=40",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profiles": ["window:0.2"]}, "target 'window:0.2': a window cannot be tracked"),
        ({"profiles": ["decay:cosine:0.2"]}, "target 'decay:cosine:0.2': a decay cannot be tracked"),
        ({"profiles": ["0.1@t=500"]}, "target '0.1@t=500': an average read at one time cannot be tracked"),
        ({"profiles": ["exponential:decay=1.5"]}, "the decay must be above 0 and below 1, found 1.5"),
        ({"profiles": ["exponental:tau=5"]}, "target 'exponental:tau=5': unknown kind 'exponental'"),
        ({"profiles": ["0.1", "0.1"]}, "target '0.1' is asked for twice"),
        ({"sigma_rels": [0.1], "profiles": [0.1]}, "target '0.1' is asked for twice"),
        ({"profiles": ["uniform", "power:gamma=0"]}, "power:gamma=0 and uniform are the same average"),
        ({"profiles": ["uniform", "uniform:start=9"], "start": 9}, "uniform:start=9 and uniform are the same average"),
        ({"profiles": "uniform"}, "profiles='uniform': a list is expected"),
        ({"profiles": 0.1}, "profiles=0.1: a list is expected"),
        ({"sigma_rels": 0.1}, "sigma_rels=0.1: a list is expected"),
        ({"sigma_rels": []}, "no target: at least one is expected"),
    ],
    ids=str,
)
def test_what_cannot_be_tracked_is_refused_and_nothing_is_written(tmp_path, options, message):
    with pytest.raises(TargetError) as caught:
        PostHocEMA(Free(w=1), tmp_path / "run", **options)
    assert message in caught.value.message
    assert caught.value.hint
    assert listing(tmp_path) == {}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"unit": "samples"}, "other unit: expected samples at position 0, found steps"),
        ({"profiles": ["exponential:tau=8"]}, "other averages"),
        ({"start": 40}, "other averages: expected exponential:tau=9,corrected,start=40"),
    ],
)
def test_a_run_with_another_time_unit_or_other_averages_is_refused(tmp_path, options, text):
    given = {"unit": "steps", "profiles": ["exponential:tau=9,corrected"]}
    PostHocEMA(Free(w=1), tmp_path, **given)
    with pytest.raises(ModelMismatch) as caught:
        PostHocEMA(Free(w=1), tmp_path, **(given | options))
    assert text in caught.value.message


def test_an_average_is_swapped_in_by_any_of_its_spellings(tmp_path):
    model = Free(w=1)
    texts = ["exponential:decay=0.9", "uniform", 0.1]
    ema = PostHocEMA(model, tmp_path, snapshot_every=1e9, profiles=texts)
    for step in range(1, 11):
        model.set(w=[float(step)])
        ema.update()
    for text, other in [*zip(texts, texts, strict=True), ("uniform", "power:gamma=0"), ("uniform", "uniform:start=0")]:
        with ema.swapped(text):
            expected = model.w.item()
        with ema.swapped(other):
            assert model.w.item() == expected
    for text in ("exponential:decay=0.8", "uniform:start=5", "exponential:decay=0.9,corrected"):
        with pytest.raises(OrderError, match="is not tracked; this run tracks"), ema.swapped(text):
            pass


def test_mixed_kinds_are_sources_of_each_other(tmp_path):
    # Oracle: the same average, tracked, of a random walk. Its expected error is the forecast.
    steps, axes = 2000, 400
    path = np.cumsum(np.random.default_rng(1).standard_normal((steps, axes)), axis=0)
    stored = ["exponential:halflife=150,ramp=0.1", "uniform", "0.08", "exponential:tau=300,corrected"]
    wanted = ["0.12", "exponential:halflife=200", "uniform:start=1000"]
    models = {name: Free(w=axes) for name in ("stored", "wanted")}
    emas = {
        name: PostHocEMA(models[name], tmp_path / name, snapshot_every=250, profiles=texts)
        for name, texts in (("stored", stored), ("wanted", wanted))
    }
    for step in range(1, steps + 1):
        for name in models:
            models[name].set(w=path[step - 1])
            emas[name].update()
    plan = reconstruct(tmp_path / "stored", wanted, out=tmp_path / "out", tolerance="exact")
    truth = open_run(tmp_path / "wanted").snapshots[-1]
    for index, planned in enumerate(plan.targets):
        target = truth.read_box(index, 0, truth.layout.averaged(0)[0][1][0])
        found = tensors_of(tmp_path / "out" / planned.target.slug)["w"].numpy()
        error = np.linalg.norm(found - target) / np.linalg.norm(path[-1] - target)
        assert planned.fit.forecast < 0.05
        # 400 axes are 400 walks: their mean square is within a fifth of its expectation. Float32 adds 1e-6 or so, and
        # weights that are read at whole steps half a step.
        assert error < 1.3 * planned.fit.forecast + 1e-3


def test_a_stored_average_of_any_kind_is_rebuilt_bit_for_bit(tmp_path):
    texts = ["exponential:decay=0.9", "exponential:tau=9,ramp=0.1", "uniform", "uniform:start=15"]
    model = Free(w=3)
    ema = PostHocEMA(model, tmp_path / "run", snapshot_every=10, profiles=texts)
    for step in range(1, 31):
        model.set(w=[math.sin(step), step, 1 / step])
        ema.update()
    plan = reconstruct(tmp_path / "run", texts, out=tmp_path / "out")
    for text, planned in zip(texts, plan.targets, strict=True):
        with ema.swapped(text):
            assert same_bits(tensors_of(tmp_path / "out" / planned.target.slug)["w"], model.w.detach())


def test_the_listing_of_a_run_names_every_kind(tmp_path, capsys):
    PostHocEMA(Free(w=1), tmp_path, profiles=[0.1, "exponential:halflife=7,ramp=0.1", "uniform", "uniform:start=9"])
    show_info(open_run(tmp_path), as_json=True)
    shown = capsys.readouterr().out
    for text in (
        "sigma_rel 0.1 (power:gamma=6.9",
        "half-life 7 (exponential:tau=10.09",
        "running mean (power:gamma=0)",
    ):
        assert text in shown
    assert "running mean (uniform:start=9)" in shown
