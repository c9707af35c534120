"""Formats: files of every shape, written by hand, come out of a run folder bit for bit and as what they really are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from builders import no_flush, same_bits
from foreign import STEPS, TIMES, kept, raw, states
from safetensors.torch import load_file, save_file

from sharded_phema.errors import StoreError
from sharded_phema.importers.bringing import import_run
from sharded_phema.importers.contract import Reading
from sharded_phema.importers.formats import FORMATS, format_of
from sharded_phema.rebuild import reconstruct
from sharded_phema.store import Run
from sharded_phema.width import gamma_of

GAMMAS = {"0.050": gamma_of(0.05), "0.100": gamma_of(0.10)}


def power(gamma: float):
    """Share that a power average keeps at a step."""
    return lambda step: (1.0 - 1.0 / step) ** (gamma + 1.0)


def brought(source: Path, root: Path, format: str = "", **reading: Any) -> Run:
    with no_flush():
        return import_run(source, root, format=format, reading=Reading(**reading), memory="64KiB")


def check_held(run: Run, several: dict[str, dict[int, foreign.State]]) -> None:
    """Every number of every average, and what is copied, is that of the state dict."""
    assert run.record.averages == tuple(several) and [s.t for s in run.snapshots] == list(TIMES)
    for k, held in enumerate(several.values()):
        for snapshot in run.snapshots:
            state = held[int(snapshot.t)]
            for index, parameter in enumerate(run.record.parameters):
                found = torch.from_numpy(snapshot.read_flat(k, index, 0, math.prod(parameter.shape)))
                assert same_bits(found.view(parameter.shape), state[parameter.name].float()), parameter.name
            for index, tensor in enumerate(run.record.raw):
                assert same_bits(snapshot.read_raw(index, 0, 1).view(()), state[tensor.name])
    names = {p.name for p in run.record.parameters} | {tensor.name for tensor in run.record.raw}
    assert names == set(states()[0]) and [tensor.name for tensor in run.record.raw] == ["1.num_batches_tracked"]


WEIGHTS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "hf": (foreign.write_hf, "hf", {}),
    "torch": (foreign.write_torch, "torch", {"time_pattern": "step_([0-9]+)"}),
    "net_ema": (foreign.write_nested, "torch", {"key": "state.model", "prefix": "net_ema."}),
    "dcp": (foreign.write_dcp, "dcp", {"key": "model"}),
    "lightning": (foreign.write_lightning, "lightning", {}),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_checkpoints_are_stored_bit_for_bit_under_the_format_that_their_names_tell(name, tmp_path) -> None:
    # Oracle: the state dicts that were written.
    write, format, how = WEIGHTS[name]
    dtype = torch.bfloat16 if name in ("hf", "dcp") else torch.float32
    write(tmp_path / "source", raw(dtype))
    assert format_of(tmp_path / "source") == format
    run = brought(tmp_path / "source", tmp_path / "run", **how)
    assert (run.record.dtype, run.record.unit) == (str(dtype).removeprefix("torch."), "steps")
    check_held(run, {"checkpoint": raw(dtype)})
    assert all(len(snapshot.norms) == 1 and snapshot.norms[0] > 0.0 for snapshot in run.snapshots)


def test_checkpoints_rebuild_averages_that_were_kept_by_hand_as_forecast(tmp_path) -> None:
    # Oracle: averages kept step by step. The weights of a training do not walk quite at random.
    foreign.write_hf(tmp_path / "source", raw())
    run = brought(tmp_path / "source", tmp_path / "run")
    plan = reconstruct(run.root.url, ["0.1", "window:0.5", "checkpoint"], out=tmp_path / "out", tolerance="exact")
    for one in plan.targets[:2]:
        found = load_file(tmp_path / "out" / one.target.slug / "model.safetensors")
        assert foreign.error(found, one.profile) <= 2.0 * one.fit.forecast
    found = load_file(tmp_path / "out" / "checkpoint" / "model.safetensors")
    assert all(same_bits(found[name], tensor) for name, tensor in states()[-1].items())


def test_sharded_safetensors_are_put_together_by_their_index(tmp_path) -> None:
    state = states()[99]
    halves = [dict(list(state.items())[:4]), dict(list(state.items())[4:])]
    folder = tmp_path / "checkpoint-100" / "unet_ema"
    folder.mkdir(parents=True)
    for index, half in enumerate(halves):
        save_file(half, folder / f"diffusion_pytorch_model-{index}.safetensors")
    weight_map = {n: f"diffusion_pytorch_model-{i}.safetensors" for i, half in enumerate(halves) for n in half}
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    run = brought(tmp_path, tmp_path / "run", "hf", key="unet_ema", profiles=("exponential:decay=0.99",))
    assert run.record.averages == (f"exponential:tau={-1 / math.log(0.99)!r}",) and len(run.record.parameters) == 8
    index_file.write_text(json.dumps({"weight_map": {"a": "../../../secret.safetensors"}}))
    with pytest.raises(StoreError, match="which is not beside it"):
        brought(tmp_path, tmp_path / "run2", "hf", key="unet_ema")


def check_rebuilt(run: Run, out: Path, targets: tuple[str, ...], slack: float) -> None:
    """Directly tracked averages are rebuilt within forecast; the slack is what whole steps of time leave."""
    plan = reconstruct(run.root.url, targets, out=out, movement="constant")
    for one in plan.targets:
        found = load_file(out / one.target.slug / "model.safetensors")
        assert foreign.error(found, one.profile) <= 2.0 * one.fit.forecast + slack, one.target.text


def test_edm2_pickles_hold_the_widths_in_their_names_and_count_images(tmp_path) -> None:
    # Oracle: averages kept by hand; a step is 4,096 images. Names lose the last three digits.
    several = {width: kept(power(gamma), TIMES) for width, gamma in GAMMAS.items()}
    foreign.write_edm2(tmp_path / "source", several, kimg=lambda t: t * 4096 // 1000)
    assert format_of(tmp_path / "source") == "edm2"
    run = brought(tmp_path / "source", tmp_path / "run")
    assert run.record.unit == "images" and [s.t for s in run.snapshots] == [4096.0 * t for t in TIMES]
    assert run.record.averages == tuple(f"power:gamma={gamma!r}" for gamma in GAMMAS.values())
    by_step = {label: held for label, held in zip(run.record.averages, several.values(), strict=True)}
    for k, held in enumerate(by_step.values()):
        for t, snapshot in zip(TIMES, run.snapshots, strict=True):
            numbers = snapshot.read_flat(k, 0, 0, 288)
            assert same_bits(torch.from_numpy(numbers).view(24, 12), held[t]["0.weight"])
    thousands = brought(tmp_path / "source", tmp_path / "kimg", unit="kimg")
    assert thousands.snapshots[-1].t == STEPS * 4096 // 1000
    # In steps everything is the same but the unit.
    plan = reconstruct(run.root.url, ["0.07"], out=tmp_path / "out")
    found = load_file(tmp_path / "out" / "0.07" / "model.safetensors")
    exact = kept(power(gamma_of(0.07)), [STEPS])[STEPS]
    scale = (foreign.flat(exact) - foreign.path()[-1]).std()
    assert (foreign.flat(found) - foreign.flat(exact)).std() <= (2.0 * plan.targets[0].fit.forecast + 1e-2) * scale


@pytest.mark.parametrize(("format", "prefix", "after"), [("ema-pytorch", "ema_model.", 1), ("posthoc-ema", "", 50)])
def test_folders_of_the_other_post_hoc_packages_are_what_they_really_kept(format, prefix, after, tmp_path) -> None:
    # Oracle: the packages' rule by hand, at every fourth call, which begin at some step.
    every, gammas = 4, (16.97, 3.5)

    def rule(gamma: float):
        def keep(step: int) -> float:
            call = step - after + 1
            if call <= 1:
                return 0.0
            return (call / (call + 1.0)) ** (gamma + 1.0) if (call - 1) % every == 0 else 1.0

        return keep

    times = [t for t in TIMES if t > after]
    several = [kept(rule(gamma), times) for gamma in gammas]
    foreign.write_karras(tmp_path / "source", several, prefix, lambda t: t - after + 1)
    with pytest.raises(StoreError, match="looks like posthoc-ema or ema-pytorch"):
        format_of(tmp_path / "source")
    profiles = tuple(f"power:gamma={gamma}" for gamma in gammas)
    with pytest.raises(StoreError, match="their files do not tell which"):
        brought(tmp_path / "source", tmp_path / "none", format, profiles=profiles)
    run = brought(tmp_path / "source", tmp_path / "run", format, profiles=profiles, update_every=every)
    assert run.record.averages == tuple(f"{text},every=4" for text in profiles)
    assert {snapshot.start for snapshot in run.snapshots} == {float(after)}
    check_rebuilt(run, tmp_path / "out", ("0.15", "0.2", "window:0.6"), 0.02)
    # What was asked for is not what was kept: the same files taken at their word rebuild something else.
    word = brought(tmp_path / "source", tmp_path / "word", format, profiles=profiles, update_every=1)
    plan = reconstruct(word.root.url, ["0.15"], out=tmp_path / "wrong")
    found = load_file(tmp_path / "wrong" / "0.15" / "model.safetensors")
    assert foreign.error(found, plan.targets[0].profile) > 0.2
    assert word.root.url != run.root.url


def test_torchtitans_average_is_a_power_profile_of_its_half_life(tmp_path) -> None:
    # Oracle: its rule by hand: half of what was counts after h of the updates so far. Harmonic sums are logarithms but
    # for half a step.
    h = 0.1
    held = kept(lambda step: 2.0 ** (-1.0 / (h * step)), TIMES)
    foreign.write_torchtitan(tmp_path / "source", held)
    with pytest.raises(StoreError, match="do not tell how long") as caught:
        brought(tmp_path / "source", tmp_path / "none", "torchtitan")
    assert repr(math.log(2.0) / 0.05 - 1.0)[:14] in caught.value.hint
    label = f"power:gamma={math.log(2.0) / h - 1.0!r}"
    run = brought(tmp_path / "source", tmp_path / "run", "torchtitan", profiles=(label,))
    assert [p.name for p in run.record.parameters][:2] == ["0.weight", "0.bias"]
    check_rebuilt(run, tmp_path / "out", ("0.15", "0.2"), 0.06)
    weights = brought(tmp_path / "source", tmp_path / "weights", "dcp", prefix="", copy=("ema.*", "train*"))
    assert "0.weight" in [p.name for p in weights.record.parameters]


def test_an_average_of_constant_decay_is_an_exponential_profile(tmp_path) -> None:
    held = kept(lambda step: 0.97, TIMES)
    foreign.write_nested(tmp_path / "source", held)
    how: dict[str, Any] = {"key": "state.model", "prefix": "net_ema.", "start": 1.0}
    run = brought(tmp_path / "source", tmp_path / "run", "torch", profiles=("exponential:decay=0.97",), **how)
    check_held(run, {f"exponential:tau={-1 / math.log(0.97)!r}": held})
    check_rebuilt(run, tmp_path / "out", ("exponential:decay=0.985",), 0.05)


def test_the_averages_of_a_callback_must_be_named(tmp_path) -> None:
    (tmp_path / "source").mkdir()
    facts = {"global_step": 9, "averaging_state": {"latest_update_step": 9}, "current_model_state": states()[8]}
    torch.save({**facts, "state_dict": states()[5]}, tmp_path / "source" / "last.ckpt")
    with pytest.raises(StoreError, match="is the average of a WeightAveraging callback"):
        brought(tmp_path / "source", tmp_path / "no")
    for how, label, state in (
        ({"profiles": ("exponential:decay=0.99",)}, "exponential:tau=99.4991624", states()[5]),
        ({"key": "current_model_state"}, "checkpoint", states()[8]),
    ):
        run = brought(tmp_path / "source", tmp_path / label[:5], **how)  # type: ignore[arg-type]
        assert run.record.averages[0].startswith(label[:16]) and run.snapshots[0].t == 9.0
        found = torch.from_numpy(run.snapshots[0].read_flat(0, 0, 0, 288)).view(24, 12)
        assert same_bits(found, state["0.weight"])


def test_every_format_has_a_reader_that_says_what_it_misses(tmp_path) -> None:
    for format in FORMATS:
        with pytest.raises(StoreError, match=r"expected|do not tell") as caught:
            brought(tmp_path, tmp_path / "run", format)
        assert caught.value.hint
    with pytest.raises(StoreError, match="looks like none of the known formats"):
        brought(tmp_path, tmp_path / "run")
    with pytest.raises(StoreError, match="unknown format"):
        brought(tmp_path, tmp_path / "run", "zip")
    with pytest.raises(StoreError, match="there is nothing"):
        brought(tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()
