from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from builders import Free, examples, listing, no_flush, same_bits, tensors_of, unclaimed
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sharded_phema.errors import ModelMismatch, OrderError, PhemaError, StoreError, TargetError, UnsupportedModel
from sharded_phema.layout import whole
from sharded_phema.manifest import RawTensor
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.profile import Power
from sharded_phema.store import open_run, run_exists
from sharded_phema.width import gamma_of, sigma_rel_of

# Torch says so of every save and load outside a process group.
pytestmark = pytest.mark.filterwarnings("ignore:.*single process")

WIDTHS = (0.05, 0.10)


@pytest.fixture(autouse=True, scope="module")
def quick_disk():
    with no_flush():
        yield


def averages(ema):
    """Copies of the tracked averages, in order: name to tensor."""
    return [
        {name: tensor.clone() for name, tensor in tensors.items()}
        for label, tensors in ema.state_dict().items()
        if label != "clock"
    ]


def assert_same_averages(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert all(same_bits(a[name], b[name]) for name in b)


def contents(snapshot):
    """Every stored average of a snapshot, through the store: name to array."""
    record = snapshot.record
    return {
        (label, parameter.name): torch.from_numpy(snapshot.read_box(a, p, whole(parameter.shape)).copy())
        for a, label in enumerate(record.averages)
        for p, parameter in enumerate(record.parameters)
    }


# What was averaged, and with which weights.


@dataclass(frozen=True)
class Rhythm:
    """Times at which update is called, and what PostHocEMA is told of them."""

    calls: tuple[float, ...]
    update_every: float = 0
    start: float = 0

    @property
    def updates(self) -> list[float]:
        """Times at which weights must enter: multiples passed since the last update, and the end (the snapshot)."""
        found, last = [], 0.0
        for t in self.calls:
            due = self.update_every == 0 or t // self.update_every > last // self.update_every
            if t >= self.start and (due or t == self.calls[-1]):
                found.append(t)
                last = t
        return found


def every(step, count, begin=0.0):
    return tuple(begin + step * k for k in range(1, count + 1))


RHYTHMS = {
    "every step": Rhythm(every(1, 400)),
    "a call every 10 steps": Rhythm(every(10, 40)),
    "a call every 100 steps": Rhythm(every(100, 10)),
    "update_every=10": Rhythm(every(1, 400), update_every=10),
    "update_every=100": Rhythm(every(1, 1000), update_every=100),
    "update_every=10 of calls every 7": Rhythm(every(7, 60), update_every=10),
    "the end between two updates": Rhythm(every(1, 345), update_every=100),
    "batch of 32, then of 100 samples": Rhythm((*every(32, 100), *every(100, 50, begin=3200))),
    "fractions": Rhythm(every(0.1, 300)),
    "start at 150": Rhythm(every(1, 400), start=150),
    "start at 150, update_every=10": Rhythm(every(1, 400), update_every=10, start=150),
    "start between two calls": Rhythm(every(10, 40), start=145),
    "first call late": Rhythm(every(1, 200, begin=1000)),
}


def realised(rhythm, tmp_path, resume_after=None):
    """Weight of each call's parameters in each average, and the averages of tau and tau^2 (tau = t / end)."""
    end, count = rhythm.calls[-1], len(rhythm.calls)

    def make():
        model = Free(one_hot=count, moments=2)
        options = {"update_every": rhythm.update_every, "start": rhythm.start}
        return model, PostHocEMA(model, tmp_path / "run", WIDTHS, snapshot_every=1e9, **options)

    model, ema = make()
    for k, t in enumerate(rhythm.calls):
        model.set(one_hot=np.eye(1, count, k)[0], moments=[t / end, (t / end) ** 2])
        ema.update(t)
        if k == resume_after:
            ema.close()
            model, ema = make()
            assert ema.resume() == t
    ema.snapshot()
    return averages(ema)


def assert_shares(average, expected, updates):
    # A share is a product of factors that are each rounded to float32: up to 6e-8 an update, relative. Where an update
    # forgets nearly everything, the little that it keeps is 1 minus a rounded number: 6e-8 of the whole, absolute.
    np.testing.assert_allclose(average["one_hot"], expected, rtol=1e-7 * (updates + 1), atol=1e-7)


@pytest.mark.parametrize("name", RHYTHMS)
def test_the_realised_profile_is_the_power_profile_at_the_times_of_the_updates(tmp_path, name):
    # Oracle: differences of the cumulative between updates; the first weights carry all that lies before them.
    rhythm = RHYTHMS[name]
    for average, sigma_rel in zip(realised(rhythm, tmp_path), WIDTHS, strict=True):
        profile = Power(gamma_of(sigma_rel), rhythm.calls[-1], rhythm.updates[0])
        shares = np.diff(profile.cumulative(np.array([0.0, *rhythm.updates])))
        expected = np.zeros(len(rhythm.calls))
        expected[[rhythm.calls.index(t) for t in rhythm.updates]] = shares
        assert_shares(average, expected, len(shares))
        tau = np.array(rhythm.updates) / rhythm.calls[-1]
        # The average of numbers up to 1 forgets its roundings of 6e-8 as it moves on; a few hundred of them remain.
        np.testing.assert_allclose(average["moments"], [shares @ tau, shares @ tau**2], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", [n for n in RHYTHMS if "late" not in n and "100 steps" not in n and "=100" not in n])
def test_the_realised_width_is_the_width_that_was_asked_for(tmp_path, name):
    # Oracle: the definition of the relative width. Updates in steps of h make it coarser by h^2 / 12 of the variance,
    # and late weights shift it by up to h; float32 moments cost 2e-6 of a variance of 0.0025.
    rhythm = RHYTHMS[name]
    step = max(np.diff([rhythm.updates[0], *rhythm.updates])) / rhythm.calls[-1]
    for average, sigma_rel in zip(realised(rhythm, tmp_path), WIDTHS, strict=True):
        mean, square = average["moments"].double().tolist()
        gamma = gamma_of(sigma_rel)
        assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel_of(gamma), rel=0.03 + 2 * step)
        assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3 + step)


@pytest.mark.parametrize("name", ["every step", "update_every=10 of calls every 7", "start at 150", "fractions"])
@pytest.mark.parametrize("part", [0.45, 0.9])
def test_the_realised_profile_survives_saving_and_resuming(tmp_path, name, part):
    rhythm = RHYTHMS[name]
    stop = int(part * len(rhythm.calls))
    found = realised(rhythm, tmp_path, resume_after=stop)
    # Closing updates the averages, so that the weights at that moment enter too.
    updates, last = [], 0.0
    for k, t in enumerate(rhythm.calls):
        due = rhythm.update_every == 0 or t // rhythm.update_every > last // rhythm.update_every
        if t >= rhythm.start and (due or k in (stop, len(rhythm.calls) - 1)):
            updates.append(t)
            last = t
    for average, sigma_rel in zip(found, WIDTHS, strict=True):
        profile = Power(gamma_of(sigma_rel), rhythm.calls[-1], updates[0])
        shares = np.diff(profile.cumulative(np.array([0.0, *updates])))
        expected = np.zeros(len(rhythm.calls))
        expected[[rhythm.calls.index(t) for t in updates]] = shares
        assert_shares(average, expected, len(shares))


@examples(25)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=12), st.integers(0, 40), st.integers(0, 100))
def test_any_times_realise_the_profile(tmp_path_factory, advances, update_every, start):
    # The end is a multiple of nothing in particular: the snapshot takes the last weights in.
    calls = tuple(float(t) for t in np.cumsum(advances))
    rhythm = Rhythm(calls, update_every, min(start, calls[-1]))
    for average, sigma_rel in zip(realised(rhythm, tmp_path_factory.mktemp("any")), WIDTHS, strict=True):
        profile = Power(gamma_of(sigma_rel), calls[-1], rhythm.updates[0])
        shares = np.diff(profile.cumulative(np.array([0.0, *rhythm.updates])))
        expected = np.zeros(len(calls))
        expected[[calls.index(t) for t in rhythm.updates]] = shares
        assert_shares(average, expected, len(shares))


def test_a_snapshot_records_when_it_was_taken_and_when_the_averaging_began(tmp_path):
    model = Free(w=1)
    ema = PostHocEMA(model, tmp_path / "run", snapshot_every=20, unit="samples", update_every=4, start=11)
    for t in range(1, 51):
        ema.update(t)
    ema.close()
    run = open_run(tmp_path / "run")
    assert run.record.unit == "samples"
    assert [(s.t, s.start) for s in run.snapshots] == [(20.0, 11.0), (40.0, 11.0), (50.0, 11.0)]


# Time.


def test_without_a_time_each_call_is_one_unit_later(tmp_path):
    model = Free(one_hot=7)
    ema = PostHocEMA(model, tmp_path / "run", snapshot_every=100)
    assert ema.t == 0.0
    for k, t in enumerate([None, None, 10.5, None, None]):
        ema.update(t)
        assert ema.t == [1.0, 2.0, 10.5, 11.5, 12.5][k]


@pytest.mark.parametrize("t", [5, 4.999, 0, -1, math.nan, math.inf, -math.inf])
def test_time_that_does_not_advance_is_refused_and_changes_nothing(tmp_path, t):
    model = Free(w=2)
    ema = PostHocEMA(model, tmp_path / "run")
    model.set(w=[1.0, 2.0])
    ema.update(5)
    before = averages(ema)
    model.set(w=[7.0, 7.0])
    with pytest.raises(OrderError, match="must be later than the last one, 5") as caught:
        ema.update(t)
    assert "steps" in caught.value.hint
    assert ema.t == 5.0
    assert_same_averages(averages(ema), before)


# Models.


def test_a_bfloat16_model_is_averaged_in_float32_and_the_averages_move(tmp_path):
    # One bfloat16 step of 2^-7 in the weights, of which an average takes a small share at each update: an average in
    # bfloat16 would stand still. Oracle: the recurrence in float64.
    model = Free(dtype=torch.bfloat16, w=3)
    ema = PostHocEMA(model, tmp_path / "run", snapshot_every=1e9)
    expected, gammas = np.ones((2, 3)), [gamma_of(s) for s in WIDTHS]
    model.set(w=[1.0, 1.0, 1.0])
    ema.update(1000)
    model.set(w=[1.0078125, 1.0, 0.99609375])
    for t in range(1001, 1011):
        ema.update(t)
        for row, gamma in zip(expected, gammas, strict=True):
            row += (1 - (1 - 1 / t) ** (gamma + 1)) * (np.array([1.0078125, 1.0, 0.99609375]) - row)
    for average, row in zip(averages(ema), expected, strict=True):
        assert average["w"].dtype == torch.float32
        np.testing.assert_allclose(average["w"], row, rtol=0, atol=1e-6)  # 10 roundings of 6e-8
        assert 1.0001 < average["w"][0] < 1.0077
    assert all(t.dtype == torch.float32 for t in tensors_of(ema.snapshot()).values())
    with ema.swapped(0.05):
        assert model.get_parameter("w").dtype == torch.bfloat16
        assert model.get_parameter("w").tolist() == torch.from_numpy(expected[0]).bfloat16().tolist()


def test_a_float64_model_is_averaged_in_float32(tmp_path):
    model = Free(dtype=torch.float64, w=2)
    ema = PostHocEMA(model, tmp_path / "run")
    model.set(w=np.array([1 / 3, 2 / 3]))
    ema.update()
    assert averages(ema)[0]["w"].tolist() == np.float32([1 / 3, 2 / 3]).tolist()
    with ema.swapped(0.05):
        assert model.get_parameter("w").tolist() == np.float32([1 / 3, 2 / 3]).tolist()
    assert model.get_parameter("w").tolist() == [1 / 3, 2 / 3]


class Odd(nn.Module):
    """Tied, frozen, 0-d, empty and transposed parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.frozen = nn.Parameter(torch.tensor([0.1, 1 / 3]), requires_grad=False)
        self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t())
        self.register_buffer("counter", torch.zeros(1))


def test_tied_scalar_empty_and_transposed_parameters_are_averaged_once_each_and_the_rest_is_stored(tmp_path):
    model = Odd()
    ema = PostHocEMA(model, tmp_path / "run", snapshot_every=1e9)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(20):
        with torch.no_grad():
            model.scale += 1.0
            model.turned += 1.0
        ema.update()
    ema.snapshot()
    (snapshot,) = open_run(tmp_path / "run").snapshots
    assert [(p.name, p.shape) for p in snapshot.record.parameters] == [
        (name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad
    ]
    assert "second.weight" not in start
    assert snapshot.record.frozen == (RawTensor("frozen", (2,), "float32", "parameter"),)
    assert snapshot.record.copied == (RawTensor("counter", (1,), "float32", "buffer"),)
    assert same_bits(snapshot.read_raw(1, 0, 2), start["frozen"])
    assert same_bits(snapshot.read_raw(0, 0, 1), model.counter)
    found = contents(snapshot)
    shares = np.diff(Power(gamma_of(0.05), 20.0, 1.0).cumulative(np.arange(21.0)))
    shift = float(shares @ np.arange(1.0, 21.0))
    label = snapshot.record.averages[0]
    for name in ("first.weight", "first.bias", "second.bias", "none"):  # stand still, so exactly
        assert same_bits(found[label, name], start[name])
    for name in ("scale", "turned"):
        np.testing.assert_allclose(found[label, name], start[name] + shift, rtol=1e-6)
    with ema.swapped(sigma_rel=0.05):
        np.testing.assert_allclose(model.turned.detach(), start["turned"] + shift, rtol=1e-6)


def test_what_is_no_module_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"expected a torch\.nn\.Module"):
        PostHocEMA({"w": torch.zeros(2)}, tmp_path / "run")
    assert listing(tmp_path) == {}


# Swapping.


@pytest.fixture
def trained(tmp_path):
    """A small network that moved for 30 steps, its averages, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    ema = PostHocEMA(model, tmp_path / "run", snapshot_every=1e9)
    for _ in range(30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        ema.update()
    return model, ema, torch.randn(5, 4)


@pytest.mark.parametrize(
    ("index", "options"),
    [
        (0, {"sigma_rel": 0.05}),
        (1, {"sigma_rel": 0.10}),
        (1, {"target": "0.1"}),
        (1, {"target": f"power:gamma={gamma_of(0.10)!r}"}),
    ],
)
def test_the_model_computes_with_the_average_and_then_with_its_own_weights(trained, index, options):
    # Oracle: a functional call with the averages in place of the parameters.
    model, ema, x = trained
    weights, before = {n: p.detach().clone() for n, p in model.named_parameters()}, model(x)
    kept = averages(ema)
    with ema.swapped(**options):
        assert torch.equal(model(x), torch.func.functional_call(model, kept[index], x))
        assert not torch.allclose(model(x), before, atol=1e-3)
    assert all(same_bits(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(model(x), before)
    assert_same_averages(averages(ema), kept)


@pytest.mark.parametrize("error", [RuntimeError("inside"), KeyboardInterrupt("inside"), GeneratorExit("inside")])
def test_an_exception_inside_swapped_puts_the_weights_back(trained, error):
    model, ema, x = trained
    weights, before = {n: p.detach().clone() for n, p in model.named_parameters()}, model(x)
    with pytest.raises(type(error), match="inside"), ema.swapped(0.05):
        with torch.no_grad():
            model[0].weight += 1.0
        raise error
    assert all(same_bits(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(model(x), before)
    ema.update()


def test_special_values_come_back_bit_for_bit(tmp_path):
    model = Free(w=5)
    ema = PostHocEMA(model, tmp_path / "run")
    ema.update()
    model.set(
        w=torch.tensor([0x7FC00123, 0x7F800000, -0x80000000, 1, 0x3F800001], dtype=torch.int32).view(torch.float32)
    )
    kept = model.get_parameter("w").detach().clone()
    with ema.swapped(0.05):
        assert model.get_parameter("w").tolist() == [0.0] * 5
    assert same_bits(model.get_parameter("w"), kept)


def test_acts_that_would_see_swapped_weights_are_refused_and_the_swap_goes_on(trained, tmp_path):
    model, ema, x = trained
    before, files, state = averages(ema), listing(tmp_path), ema.state_dict()
    with ema.swapped(0.05):
        inside = model(x)
        for act in (ema.update, ema.snapshot, lambda: ema.swapped(0.10).__enter__(), lambda: ema.update(99), ema.close):
            with pytest.raises(OrderError, match="swapped"):
                act()
        for act in (ema.resume, lambda: ema.load_state_dict(state)):
            with pytest.raises(PhemaError):
                act()
        assert torch.equal(model(x), inside)
    assert ema.t == 30.0
    assert_same_averages(averages(ema), before)
    assert listing(tmp_path) == files
    ema.update()


def test_closing_inside_a_swap_is_refused_also_where_nothing_is_left_to_store(trained):
    _, ema, _ = trained
    ema.snapshot()
    with ema.swapped(0.05), pytest.raises(OrderError, match="swapped"):
        ema.close()


@pytest.mark.parametrize("arguments", [((), {}), ((0.05,), {"sigma_rel": 0.05})])
def test_swapped_takes_one_average(trained, arguments):
    _, ema, _ = trained
    with pytest.raises(OrderError, match=r"takes one average, found [02]"), ema.swapped(*arguments[0], **arguments[1]):
        pass


@pytest.mark.parametrize("target", ["0.05@t=10", "0.5", "nonsense", "window:2", {"nothing.*": 0.1}, {}])
def test_swapping_in_what_cannot_be_rebuilt_is_refused_and_leaves_the_weights(trained, target):
    model, ema, x = trained
    before = model(x)
    with pytest.raises(PhemaError) as caught, ema.swapped(target):
        pass
    assert caught.value.hint
    assert torch.equal(model(x), before)


def test_swapping_before_the_first_update_is_refused(tmp_path):
    ema = PostHocEMA(Free(w=1), tmp_path / "run", start=10)
    ema.update()
    with pytest.raises(OrderError, match="nothing was averaged yet"), ema.swapped(0.05):
        pass


# Storage that was replaced.

REPLACED = {
    "float64": lambda model: model.to(torch.float64),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "assign": lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
    "new parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.zeros(8, 4))),
    "data": lambda model: setattr(model[0].weight, "data", torch.zeros(8, 4)),
}


@pytest.mark.parametrize("name", REPLACED)
def test_storage_replaced_after_construction_is_detected_at_the_snapshot(trained, tmp_path, name):
    model, ema, _ = trained
    before = listing(tmp_path)
    REPLACED[name](model)
    with pytest.raises(OrderError, match=r"0\.weight: the model's storage was replaced") as caught:
        ema.snapshot()
    assert "after the last model.to" in caught.value.hint
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name", REPLACED)
def test_storage_replaced_after_construction_is_detected_at_a_swap(trained, name):
    # Else the model would be evaluated with its own weights in the belief that they are averages.
    model, ema, _ = trained
    REPLACED[name](model)
    with pytest.raises(OrderError, match="storage was replaced"), ema.swapped(0.05):
        pass


# Snapshots, closing, continuing.


def test_a_second_snapshot_at_one_time_gives_the_same_folder_and_stores_nothing(trained, tmp_path):
    _, ema, _ = trained
    folder = ema.snapshot()
    before = listing(tmp_path)
    assert ema.snapshot() == folder
    assert listing(tmp_path) == before
    assert Path(folder).is_dir()
    assert Path(folder).parent.parent == tmp_path / "run"
    assert folder == open_run(tmp_path / "run").snapshots[0].where


def test_a_snapshot_stores_the_averages_as_they_are(trained, tmp_path):
    _, ema, _ = trained
    ema.snapshot()
    (snapshot,) = open_run(tmp_path / "run").snapshots
    kept = averages(ema)
    for (label, name), values in contents(snapshot).items():
        assert same_bits(values, kept[snapshot.record.averages.index(label)][name])


def test_a_snapshot_before_anything_was_averaged_is_refused(tmp_path):
    ema = PostHocEMA(Free(w=1), tmp_path / "run", start=10)
    for act in (lambda: None, ema.update):
        act()
        with pytest.raises(OrderError, match="nothing was averaged yet"):
            ema.snapshot()
        assert not ema.begun
    ema.close()
    assert open_run(tmp_path / "run").snapshots == ()


def test_averaging_has_begun_once_weights_were_taken_or_restored(tmp_path):
    ema = PostHocEMA(Free(w=1), tmp_path / "run", start=10)
    ema.update(12)
    assert ema.begun
    ema.close()
    again = PostHocEMA(Free(w=1), tmp_path / "run", start=10)
    assert not again.begun
    again.resume()
    assert again.begun


def test_snapshots_are_stored_when_multiples_are_passed_and_at_the_end(tmp_path):
    with PostHocEMA(Free(w=1), tmp_path / "run", snapshot_every=10) as ema:
        for t in range(3, 48, 4):
            ema.update(t)
    assert [s.t for s in open_run(tmp_path / "run").snapshots] == [11, 23, 31, 43, 47]


def test_closing_twice_stores_once_and_ends_the_averaging(tmp_path):
    ema = PostHocEMA(Free(w=1), tmp_path / "run", snapshot_every=10)
    for _ in range(15):
        ema.update()
    ema.close()
    before = listing(tmp_path)
    ema.close()
    assert listing(tmp_path) == before
    assert [s.t for s in open_run(tmp_path / "run").snapshots] == [10, 15]
    for act in (ema.update, ema.snapshot):
        with pytest.raises(OrderError, match="closed"):
            act()


def test_closing_at_a_snapshot_stores_it_once(tmp_path):
    with PostHocEMA(Free(w=1), tmp_path / "run", snapshot_every=5) as ema:
        for _ in range(10):
            ema.update()
    assert [s.t for s in open_run(tmp_path / "run").snapshots] == [5, 10]


def test_closing_stores_weights_that_no_update_took_yet(tmp_path):
    # The run ends before the first multiple of update_every: the weights at the end are still worth keeping.
    with PostHocEMA(Free(w=1), tmp_path / "run", update_every=100) as ema:
        for _ in range(15):
            ema.update()
    assert [s.t for s in open_run(tmp_path / "run").snapshots] == [15]


def test_an_exception_in_the_block_stores_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="training"), PostHocEMA(Free(w=1), tmp_path / "run") as ema:
        ema.update()
        raise RuntimeError("training")
    assert open_run(tmp_path / "run").snapshots == ()


def test_a_failed_snapshot_is_a_store_error_and_can_be_taken_again(trained, tmp_path):
    _, ema, _ = trained
    (tmp_path / "run" / "snapshots").write_text("in the way")
    with pytest.raises(StoreError):
        ema.snapshot()
    (tmp_path / "run" / "snapshots").unlink()
    ema.snapshot()
    assert [s.t for s in open_run(tmp_path / "run").snapshots] == [30]


def test_a_snapshot_cut_short_stays_unfinished_and_later_ones_are_stored(tmp_path):
    # The tensors are written and their record is not, as where the disk fills up between the two.
    ema = PostHocEMA(Free(w=1), tmp_path / "run", snapshot_every=1e9)
    ema.update()
    session = Path(ema.snapshot()).name.rsplit("-", 1)[0]
    obstacle = tmp_path / "run" / "snapshots" / f"{session}-000001" / "snapshot.json"
    obstacle.mkdir(parents=True)
    ema.update()
    with pytest.raises(StoreError):
        ema.snapshot()
    obstacle.rmdir()
    ema.update()
    ema.snapshot()
    run = open_run(tmp_path / "run")
    assert ([s.t for s in run.snapshots], len(run.unfinished), run.damaged) == ([1, 3], 1, ())


OTHER_RUNS = {
    "other shape": (lambda: Free(a=3, b=5), {}, "parameters"),
    "other name": (lambda: Free(a=3, c=4), {}, "parameters"),
    "one more": (lambda: Free(a=3, b=4, c=1), {}, "parameters"),
    "one less": (lambda: Free(a=3), {}, "parameters"),
    "other widths": (lambda: Free(a=3, b=4), {"sigma_rels": (0.05, 0.11)}, "averages"),
    "more widths": (lambda: Free(a=3, b=4), {"sigma_rels": (0.05, 0.10, 0.15)}, "averages"),
    "other order": (lambda: Free(a=3, b=4), {"sigma_rels": (0.10, 0.05)}, "averages"),
    "other unit": (lambda: Free(a=3, b=4), {"unit": "tokens"}, "unit"),
    "other dtype": (lambda: Free(a=3, b=4), {"dtype": "bfloat16"}, "dtype"),
}


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", OTHER_RUNS)
def test_the_folder_of_another_run_is_refused_and_nothing_is_written(tmp_path, name, stored):
    with PostHocEMA(Free(a=3, b=4), tmp_path / "run") as ema:
        if stored:
            ema.update()
    before = listing(tmp_path)
    make, options, text = OTHER_RUNS[name]
    with pytest.raises(ModelMismatch, match=f"other {text}") as caught:
        PostHocEMA(make(), tmp_path / "run", **options)
    assert "its own folder" in caught.value.hint
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sigma_rels": ()}, "no target"),
        ({"sigma_rels": (0.05, 0.3)}, "0.3"),
        ({"sigma_rels": (0.0,)}, "0.0"),
        ({"sigma_rels": (0.05, 0.05)}, "twice"),
        ({"sigma_rels": (0.1, f"power:gamma={gamma_of(0.1)!r}")}, ""),
        ({"sigma_rels": ("window:0.2",)}, "window"),
        ({"sigma_rels": ("0.05@t=10",)}, "0.05@t=10"),
        ({"sigma_rels": 0.05}, "0.05"),
        ({"unit": 5}, "unit"),
        ({"snapshot_every": 0}, "snapshot_every"),
        ({"update_every": -1}, "update_every"),
        ({"start": math.nan}, "start"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_and_nothing_is_written(tmp_path, options, text):
    with pytest.raises(PhemaError) as caught:
        PostHocEMA(Free(w=1), tmp_path / "run", **options)
    assert text in caught.value.message
    assert caught.value.hint
    assert listing(tmp_path) == {}


def test_a_width_or_rhythm_that_cannot_be_is_a_target_error(tmp_path):
    for options in ({"sigma_rels": (0.3,)}, {"snapshot_every": -1}):
        with pytest.raises(TargetError):
            PostHocEMA(Free(w=1), tmp_path / "run", **options)


# A training run whose weights are a function of time, so that it can be cut anywhere.


class Training:
    """Weights that depend on the step alone, and averages of them in ``root``."""

    def __init__(self, root, **options) -> None:
        self.model = Free(a=(3, 4), b=5, c=(), none=(0, 2))
        self.ema = PostHocEMA(self.model, root, **({"snapshot_every": 10, "update_every": 3} | options))

    def run(self, stop):
        while self.ema.t < stop:
            rng = np.random.default_rng(int(self.ema.t))
            self.model.set(a=rng.standard_normal((3, 4)), b=rng.standard_normal(5), c=rng.standard_normal())
            self.ema.update()
        return self


def snapshots_of(root):
    return {snapshot.t: contents(snapshot) for snapshot in open_run(root).snapshots}


def assert_same_snapshots(found, expected):
    assert found.keys() == expected.keys()
    for t, tensors in expected.items():
        assert found[t].keys() == tensors.keys()
        assert all(same_bits(found[t][key], tensors[key]) for key in tensors)


@pytest.fixture
def uninterrupted(tmp_path):
    whole_run = Training(tmp_path / "whole").run(64)
    whole_run.ema.close()
    return snapshots_of(tmp_path / "whole")


def test_resuming_from_the_last_snapshot_continues_bit_for_bit(tmp_path, uninterrupted):
    Training(tmp_path / "run").run(37)  # killed: what came after 30 is lost
    again = Training(tmp_path / "run")
    assert again.ema.resume() == again.ema.t == 30.0
    again.run(64).ema.close()
    assert_same_snapshots(snapshots_of(tmp_path / "run"), uninterrupted)


@pytest.mark.parametrize("t", [10, 20, 30])
def test_resuming_from_an_earlier_snapshot_leaves_the_later_behind(tmp_path, uninterrupted, t):
    Training(tmp_path / "run").run(52)
    before = listing(tmp_path / "run")
    again = Training(tmp_path / "run")
    assert again.ema.resume(t) == again.ema.t == t
    again.run(64).ema.close()
    assert_same_snapshots(snapshots_of(tmp_path / "run"), uninterrupted)
    assert len(open_run(tmp_path / "run").abandoned) == (50 - t) // 10
    assert unclaimed(before).items() <= listing(tmp_path / "run").items()  # nothing was overwritten or deleted


def test_resuming_twice_continues_bit_for_bit(tmp_path, uninterrupted):
    Training(tmp_path / "run").run(37)
    second = Training(tmp_path / "run")
    second.ema.resume(20)
    second.run(55)
    third = Training(tmp_path / "run")
    third.ema.resume()
    third.run(64).ema.close()
    assert_same_snapshots(snapshots_of(tmp_path / "run"), uninterrupted)


def through_torch(ema, fresh, folder):
    folder.mkdir()
    torch.save(ema.state_dict(), folder / "state.pt")
    fresh.load_state_dict(torch.load(folder / "state.pt", weights_only=True))


def through_dcp(ema, fresh, folder):
    dcp.save({"ema": ema}, checkpoint_id=folder, no_dist=True)
    dcp.load({"ema": fresh}, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize("carry", [through_torch, through_dcp])
@pytest.mark.parametrize("stop", [1, 2, 14, 20, 37])
@pytest.mark.parametrize("same_folder", [True, False])
def test_a_state_continues_bit_for_bit(tmp_path, uninterrupted, carry, stop, same_folder):
    # Also between two updates (update_every=3), where the clock and the averages stand at different times.
    first = Training(tmp_path / "run").run(stop)
    again = Training(tmp_path / ("run" if same_folder else "other"))
    carry(first.ema, again.ema, tmp_path / "state")
    assert again.ema.t == stop
    assert_same_averages(averages(again.ema), averages(first.ema))
    again.run(64).ema.close()
    expected = uninterrupted if same_folder else {t: c for t, c in uninterrupted.items() if t > stop}
    found = snapshots_of(again.ema.root)
    assert_same_snapshots({t: c for t, c in found.items() if same_folder or t > stop}, expected)


@pytest.mark.parametrize("carry", [through_torch, through_dcp])
def test_a_state_older_than_the_snapshots_leaves_them_behind(tmp_path, uninterrupted, carry):
    first = Training(tmp_path / "run").run(25)
    fresh = Training(tmp_path / "unused")
    carry(first.ema, fresh.ema, tmp_path / "state")
    first.run(52)
    again = Training(tmp_path / "run")
    again.ema.load_state_dict(fresh.ema.state_dict())
    again.run(64).ema.close()
    assert_same_snapshots(snapshots_of(tmp_path / "run"), uninterrupted)
    assert len(open_run(tmp_path / "run").abandoned) == 3


def test_a_folder_with_snapshots_refuses_everything_until_the_averages_are_restored(tmp_path):
    Training(tmp_path / "run").run(20)
    before = listing(tmp_path)
    again = Training(tmp_path / "run")
    for act in (again.ema.update, again.ema.snapshot, lambda: again.ema.swapped(0.05).__enter__()):
        with pytest.raises(OrderError, match="up to steps 20, and their averages were not restored") as caught:
            act()
        assert "resume" in caught.value.hint
    assert again.ema.t == 0.0
    assert unclaimed(listing(tmp_path)) == unclaimed(before)
    again.ema.resume()
    again.ema.update()


def test_closing_without_having_restored_stores_nothing(tmp_path):
    Training(tmp_path / "run").run(20)
    before = listing(tmp_path)
    with Training(tmp_path / "run").ema:
        pass
    assert unclaimed(listing(tmp_path)) == unclaimed(before)


def test_a_snapshot_right_after_resuming_gives_the_folder_that_holds_it(tmp_path):
    first = Training(tmp_path / "run").run(20)
    folder = first.ema.snapshot()
    before = listing(tmp_path)
    again = Training(tmp_path / "run")
    again.ema.resume()
    assert again.ema.snapshot() == folder
    again.ema.close()
    assert unclaimed(listing(tmp_path)) == unclaimed(before)


@pytest.mark.parametrize("t", [15, 40, 0, math.nan])
def test_resuming_where_no_snapshot_is_says_which_there_are(tmp_path, t):
    Training(tmp_path / "run").run(30)
    again = Training(tmp_path / "run")
    with pytest.raises(StoreError, match=r"there are: 10, 20, 30") as caught:
        again.ema.resume(t)
    assert caught.value.hint
    assert again.ema.t == 0.0
    with pytest.raises(OrderError):
        again.ema.update()


def test_resuming_a_new_run_is_refused(tmp_path):
    training = Training(tmp_path / "run")
    with pytest.raises(StoreError, match="no snapshot at all"):
        training.ema.resume()
    training.run(3)


def test_resuming_from_a_damaged_snapshot_is_refused(tmp_path):
    folder = Training(tmp_path / "run").run(20).ema.snapshot()
    victim = Path(folder) / "rank-00000.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    again = Training(tmp_path / "run")
    with pytest.raises(StoreError, match=victim.name):
        again.ema.resume()
    assert again.ema.resume(10) == 10.0


def test_restoring_is_refused_once_snapshots_were_stored_and_changes_nothing(tmp_path):
    training = Training(tmp_path / "run").run(14)
    other = Training(tmp_path / "other").run(7)
    before, files = averages(training.ema), listing(tmp_path)
    for act in (lambda: training.ema.load_state_dict(other.ema.state_dict()), lambda: training.ema.resume(10)):
        with pytest.raises(OrderError, match="restoring"):
            act()
        assert training.ema.t == 14.0
        assert_same_averages(averages(training.ema), before)
    assert listing(tmp_path) == files


def drop_average(state):
    del state[next(key for key in state if key != "clock")]


def drop_parameter(state):
    del state[[key for key in state if key != "clock"][-1]]["b"]


def add_parameter(state):
    state[[key for key in state if key != "clock"][-1]]["z"] = torch.zeros(2)


def reshape(state):
    average = state[[key for key in state if key != "clock"][-1]]
    average["b"] = torch.zeros(6)


def drop_clock(state):
    del state["clock"]


def drop_clock_entry(state):
    del state["clock"]["updated"]


def add_average(state):
    state["power:gamma=1"] = {}


BAD_STATES = [drop_average, drop_parameter, add_parameter, reshape, drop_clock, drop_clock_entry, add_average]


@pytest.mark.parametrize("spoil", BAD_STATES)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(tmp_path, spoil):
    state = Training(tmp_path / "run").run(5).ema.state_dict()
    state = {label: dict(tensors) for label, tensors in state.items()}
    spoil(state)
    fresh = Training(tmp_path / "fresh")
    before = averages(fresh.ema)
    with pytest.raises(ModelMismatch) as caught:
        fresh.ema.load_state_dict(state)
    assert caught.value.hint
    assert fresh.ema.t == 0.0
    assert_same_averages(averages(fresh.ema), before)
    fresh.run(3)


@pytest.mark.parametrize("bad", [None, 3.0])
def test_a_state_whose_entry_is_no_tensor_is_refused_and_changes_nothing(tmp_path, bad):
    state = Training(tmp_path / "run").run(5).ema.state_dict()
    state = {label: dict(tensors) for label, tensors in state.items()}
    state[[key for key in state if key != "clock"][-1]]["b"] = bad
    fresh = Training(tmp_path / "fresh")
    before = averages(fresh.ema)
    with pytest.raises(ModelMismatch):
        fresh.ema.load_state_dict(state)
    assert_same_averages(averages(fresh.ema), before)


def test_a_run_folder_is_made_at_construction(tmp_path):
    PostHocEMA(Free(w=1), str(tmp_path / "deep" / "run"))
    assert run_exists(tmp_path / "deep" / "run")
    record = open_run(tmp_path / "deep" / "run").record
    assert [float(label.removeprefix("power:gamma=")) for label in record.averages] == [gamma_of(s) for s in WIDTHS]
