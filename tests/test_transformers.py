"""The Trainer's averages are those of a loop by hand, in every mode, after every resume; evaluation leaves no trace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import hf
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback, TrainerState

from sharded_phema.errors import OrderError, PhemaError, StoreError, TargetError, UnsupportedModel
from sharded_phema.integrations.hf_checkpoints import output_folder
from sharded_phema.integrations.transformers import PostHocEMACallback
from sharded_phema.rebuild import reconstruct
from sharded_phema.store import open_run
from sharded_phema.width import gamma_of

ROOT = Path(__file__).parent.parent
TORCH = ["ddp", "fsdp2", "fsdp1"]
ZERO = ["zero2", "zero3", "zero2-bf16", "zero3-bf16"]
SAVING = {"save_strategy": "steps", "save_steps": 3}
EVALUATING = {"eval_strategy": "steps", "eval_steps": 3}
GAMMA = gamma_of(0.10)


def callback(**given: Any) -> PostHocEMACallback:
    # Torch's own lerp is what the loop by hand calls.
    return PostHocEMACallback(**{"snapshot_every": 2, "kernel": "foreach"} | given)


def rebuilt(root: Path, target: str, out: Path) -> dict[str, Tensor]:
    reconstruct(root, [target], out=out)
    return load_file(next(out.rglob("*.safetensors")))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


class RaisingMetric:
    """Fails when it is called for the second time: for the average."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _: Any) -> dict[str, float]:
        self.calls += 1
        if self.calls == 2:
            raise FloatingPointError("the metric fails")
        return {}


class Overflowing(hf.Trainer):
    """A loss without bounds at the second step."""

    def compute_loss(self, *given: Any, **more: Any) -> Any:
        loss = super().compute_loss(*given, **more)
        return loss * float("inf") if self.model.training and self.state.global_step == 1 else loss


def modes_body(names: list[str], root: Path) -> dict[str, dict[str, Any]]:
    found = {name: {"trained": trained(name, root), "undone": undone(name, root)} for name in names}
    if "zero2-bf16" in found:
        found["zero2-bf16"]["skipped"] = skipped(root / "skipped")
    return found


def trained(name: str, root: Path) -> dict[str, Any]:
    """Trains to the end, and once more from the checkpoint in the middle of a copy."""
    mode, out = hf.MODES[name], root / name
    with hf.accelerated():
        begun = callback(evaluate_with="0.10", export=("0.10", "0.15"))
        trainer, first = hf.make_trainer(mode, out / "a", [begun], **SAVING, **EVALUATING)
        trainer.train()
        logs = trainer.state.log_history
        hf.end(trainer)
        del trainer
    if dist.get_rank() == 0:
        shutil.copytree(out / "a", out / "b", ignore=shutil.ignore_patterns("ema_exports"))
    dist.barrier()
    with hf.accelerated():
        again = callback(export=("0.10",))
        trainer, second = hf.make_trainer(mode, out / "b", [again])
        trainer.train(resume_from_checkpoint=str(out / "b" / "checkpoint-3"))
        hf.end(trainer)
    return {
        "first": first.steps,
        "saved": first.saved,
        "second": second.steps,
        "logs": logs,
        "t": (begun.ema.t, again.ema.t),
    }


def undone(name: str, root: Path) -> bool:
    """Whether the weights are their own after an evaluation with an average that failed."""
    mode = hf.MODES[name]
    with hf.accelerated():
        trainer, recorder = hf.make_trainer(
            mode,
            root / name / "c",
            [callback(evaluate_with="0.10")],
            compute_metrics=RaisingMetric(),
            eval_strategy="steps",
            eval_steps=2,
        )
        with pytest.raises(FloatingPointError, match="the metric fails"):
            trainer.train()
        weights = mode.weights(trainer)
        same = all(torch.equal(weights[key], value) for key, value in recorder.steps[-1][1].items())
        hf.end(trainer)
    return same and len(recorder.steps) == 2


def skipped(root: Path) -> tuple[list[Any], float, list[float]]:
    """Trains with a step that overflows."""
    with hf.accelerated():
        averages = callback(export=("0.10",))
        trainer, recorder = hf.make_trainer(hf.MODES["zero2-bf16"], root, [averages], kind=Overflowing, max_steps=4)
        trainer.train()
        hf.end(trainer)
        return recorder.steps, averages.ema.t, [s.t for s in open_run(root / "ema").snapshots]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def torch_modes(root: Path) -> dict[str, Any]:
    return run_ranks(2, modes_body, TORCH, root, timeout=280)[0]


@pytest.fixture(scope="module")
def zero_modes(root: Path) -> dict[str, Any]:
    pytest.importorskip("deepspeed")
    return run_ranks(2, modes_body, ZERO, root, timeout=280)[0]


@pytest.fixture(params=[*TORCH, *ZERO])
def run(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    worlds = "torch_modes" if request.param in TORCH else "zero_modes"
    return request.param, request.getfixturevalue(worlds)[request.param]


def test_averages_are_those_of_a_loop_by_hand(run: tuple[str, Any], root: Path, tmp_path: Path) -> None:
    name, found = run
    steps = found["trained"]["first"]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6] and found["trained"]["t"] == (6, 6)
    out = root / name / "a"
    assert_same(load_file(out / "ema_exports" / "0.1" / "model.safetensors"), hf.by_hand(steps, GAMMA))
    assert_same(rebuilt(out / "ema", "0.05@t=4", tmp_path / "four"), hf.by_hand(steps[:4], gamma_of(0.05)))
    assert_same(
        rebuilt(out / "checkpoint-3" / "ema" / "000001", "0.1", tmp_path / "three"), hf.by_hand(steps[:3], GAMMA)
    )


def test_a_resumed_run_is_that_which_was_not_interrupted(run: tuple[str, Any], root: Path) -> None:
    name, found = run
    first, second = found["trained"]["first"], found["trained"]["second"]
    assert [step for step, _ in second] == [4, 5, 6]
    exported = load_file(root / name / "b" / "ema_exports" / "0.1" / "model.safetensors")
    assert_same(exported, hf.by_hand(first[:3] + second, GAMMA))
    for (_, before), (_, after) in zip(first[3:], second, strict=True):
        if name != "fsdp1":  # of which the Trainer itself does not resume exactly, with or without averages
            assert_same(after, before)


def test_the_average_is_evaluated_besides_the_weights(run: tuple[str, Any], root: Path) -> None:
    name, found = run
    logs = found["trained"]["logs"]
    steps = dict(found["trained"]["first"])
    for step, weights in found["trained"]["saved"]:  # after the evaluation
        assert_same(weights, steps[step])
    assert [entry["step"] for entry in logs if "eval_ema_0.10_loss" in entry] == [3, 6]
    assert [entry["step"] for entry in logs if "eval_loss" in entry] == [3, 6]
    logged = next(entry["eval_ema_0.10_loss"] for entry in reversed(logs) if "eval_ema_0.10_loss" in entry)
    # The Trainer computes in the precision of the training.
    average = AutoModelForCausalLM.from_pretrained(root / name / "a" / "ema_exports" / "0.1")
    expected = hf.loss_of(average, hf.make_data(4, seed=1))
    assert logged == pytest.approx(expected, rel=0.02 if "bf16" in name else 1e-5)


def test_a_failing_evaluation_puts_the_weights_back(run: tuple[str, Any]) -> None:
    assert run[1]["undone"]


def test_exports_open_by_from_pretrained_with_the_rebuilt_weights(
    run: tuple[str, Any], root: Path, tmp_path: Path
) -> None:
    name, _ = run
    out = root / name / "a"
    expected = rebuilt(out / "ema", "0.15", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(out / "ema_exports" / "0.15")
    assert model.config.architectures == ["LlamaForCausalLM"] == [type(model).__name__]
    assert model.generation_config.eos_token_id == 2
    assert all(param.dtype == torch.float32 for param in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same({key: param.detach() for key, param in model.named_parameters()}, expected)
    assert not list(out.glob(".ema_config_*"))


def test_steps_that_overflow_are_not_counted_with_deepspeed(zero_modes: dict[str, Any], root: Path) -> None:
    steps, t, stored = zero_modes["zero2-bf16"]["skipped"]
    assert [step for step, _ in steps] == [1, 3, 4] and t == 3 and stored == [2, 3]
    expected = hf.by_hand([(t, weights) for t, (_, weights) in enumerate(steps, 1)], GAMMA)
    assert_same(load_file(root / "skipped" / "ema_exports" / "0.1" / "model.safetensors"), expected)


@pytest.fixture
def plain() -> Iterator[hf.Mode]:
    with hf.accelerated():
        yield hf.MODES["plain"]


def test_steps_that_overflow_are_not_counted_with_a_scaler(plain: hf.Mode, tmp_path: Path) -> None:
    averages = callback(export="0.10")
    trainer, recorder = hf.make_trainer(plain, tmp_path, [averages], kind=Overflowing, max_steps=4)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.train()
    assert [step for step, _ in recorder.steps] == [1, 3, 4] and averages.ema.t == 3 and trainer.state.global_step == 4
    expected = hf.by_hand([(t, weights) for t, (_, weights) in enumerate(recorder.steps, 1)], GAMMA)
    assert_same(load_file(tmp_path / "ema_exports" / "0.1" / "model.safetensors"), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_the_best_checkpoint_does_not_enter_the_averages(plain: hf.Mode, tmp_path: Path, tied: bool) -> None:
    averages = callback(evaluate_with="0.10", export=["0.10"], update_every=4, snapshot_every=100)
    trainer, recorder = hf.make_trainer(
        plain,
        tmp_path,
        [averages],
        tied=tied,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_0.10_loss",
        save_total_limit=1,
        max_steps=7,
        **SAVING | {"save_steps": 4},
        **EVALUATING | {"eval_steps": 4},
    )
    trainer.train()
    losses = {e["step"]: e["eval_ema_0.10_loss"] for e in trainer.state.log_history if "eval_ema_0.10_loss" in e}
    # At step 7 the average is that of step 4, and no better: until then it is moved every fourth step.
    assert losses == {4: losses[4], 7: losses[4]} and trainer.state.best_global_step == 4
    assert trainer.state.best_metric == losses[4]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    steps = dict(recorder.steps)
    assert_same(hf.own(trainer), steps[4])  # the Trainer did load it
    exported = load_file(tmp_path / "ema_exports" / "0.1" / "model.safetensors")
    assert_same(exported, hf.by_hand([(4, steps[4]), (7, steps[7])], GAMMA))
    assert "lm_head.weight" in exported or tied


def test_early_stopping_counts_an_average_once(plain: hf.Mode, tmp_path: Path) -> None:
    class Worse(TrainerCallback):
        """Makes every evaluation worse than the one before."""

        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
            self.seen += [key for key in metrics if key.endswith("_loss")]
            if "eval_ema_0.10_loss" in metrics:
                metrics["eval_ema_0.10_loss"] = float(state.global_step)

    worse, averages = Worse(), callback(evaluate_with="0.10", export="0.10")
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer, recorder = hf.make_trainer(
        plain,
        tmp_path,
        [worse, stopping, averages],
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_0.10_loss",
        max_steps=20,
        **SAVING | {"save_steps": 1},
        **EVALUATING | {"eval_steps": 1},
    )
    trainer.train()
    assert trainer.state.global_step == 3 and averages.ema.t == 3 and trainer.state.best_global_step == 1
    assert worse.seen == ["eval_loss", "eval_ema_0.10_loss"] * 3
    assert_same(load_file(tmp_path / "ema_exports" / "0.1" / "model.safetensors"), hf.by_hand(recorder.steps, GAMMA))


def test_averages_are_evaluated_on_several_data_sets_tracked_or_not(plain: hf.Mode, tmp_path: Path) -> None:
    averages = callback(evaluate_with=["0.10", "0.2"], export="0.2")
    trainer, _ = hf.make_trainer(plain, tmp_path, [averages], max_steps=3, eval_on_start=True, **EVALUATING)
    trainer.eval_dataset = {"few": hf.make_data(2), "more": hf.make_data(4, seed=1)}
    trainer.train()
    found = {(key, entry["step"]): entry[key] for entry in trainer.state.log_history for key in entry}
    names = ["few", "more"]
    expected = {(f"eval_{name}_loss", step) for name in names for step in (0, 3)}
    expected |= {(f"eval_ema_{width}_{name}_loss", 3) for name in names for width in ("0.10", "0.2")}
    assert {key for key in found if key[0].startswith("eval") and key[0].endswith("_loss")} == expected
    rebuilt = AutoModelForCausalLM.from_pretrained(tmp_path / "ema_exports" / "0.2")
    assert found["eval_ema_0.2_more_loss", 3] == pytest.approx(hf.loss_of(rebuilt, hf.make_data(4, seed=1)), rel=1e-5)
    assert "eval_ema_0.10_few_loss" not in trainer.evaluate()  # training has ended


def test_samples_and_tokens_are_counted_as_they_are_seen(plain: hf.Mode, tmp_path: Path) -> None:
    for unit, expected in (("samples", [4, 5, 9, 10]), ("tokens", [32, 40, 72, 80])):
        seen: list[float] = []
        averages = callback(unit=unit, snapshot_every=1)
        arguments = {"max_steps": 4, "include_num_input_tokens_seen": "all", **SAVING}
        trainer, _ = hf.make_trainer(plain, tmp_path / unit, [averages], rows=5, **arguments)
        trainer.train()
        seen = [snapshot.t for snapshot in open_run(tmp_path / unit / "ema").snapshots]
        assert seen == expected
        trainer, _ = hf.make_trainer(plain, tmp_path / unit, [averages], rows=5, **arguments | {"max_steps": 6})
        trainer.train(resume_from_checkpoint=True)
        assert averages.ema.t == expected[-1] * 1.5


def test_a_run_of_two_ranks_goes_on_with_one(plain: hf.Mode, torch_modes: Any, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "ddp" / "a", tmp_path / "run", ignore=shutil.ignore_patterns("ema_exports"))
    averages = callback(export="0.10")
    trainer, recorder = hf.make_trainer(plain, tmp_path / "run", [averages])
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    expected = hf.by_hand(torch_modes["ddp"]["trained"]["first"][:3] + recorder.steps, GAMMA)
    assert_same(load_file(tmp_path / "run" / "ema_exports" / "0.1" / "model.safetensors"), expected)


@pytest.fixture(scope="module")
def trained_alone(root: Path) -> tuple[Path, list[Any]]:
    """A finished run with checkpoints, of one process, and its weights."""
    with hf.accelerated():
        trainer, recorder = hf.make_trainer(hf.MODES["plain"], root / "saved", [callback()], max_steps=4, **SAVING)
        trainer.train()
    return root / "saved", recorder.steps


@pytest.fixture
def saved(trained_alone: tuple[Path, list[Any]]) -> Path:
    return trained_alone[0]


def test_callbacks_that_the_trainer_restores_change_nothing(plain: hf.Mode, saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(saved, out)
    averages = callback(evaluate_with="0.10")
    trainer, recorder = hf.make_trainer(
        plain, out, [averages], restore_callback_states_from_checkpoint=True, **EVALUATING
    )
    trainer.train(resume_from_checkpoint=True)
    assert len(recorder.steps) == 2 and averages.ema.t == 6
    assert any("eval_ema_0.10_loss" in entry for entry in trainer.state.log_history)


def test_a_checkpoint_is_found_where_it_was_written_and_where_the_user_says(
    plain: hf.Mode, trained_alone: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    saved, steps = trained_alone
    # Written elsewhere; and another training has a checkpoint of the same step where this one would have it.
    elsewhere = callback(run_dir=tmp_path / "other")
    other, _ = hf.make_trainer(plain, tmp_path / "run", [elsewhere], max_steps=3, learning_rate=0.5, **SAVING)
    other.train()
    trainer, recorder = hf.make_trainer(plain, tmp_path / "run", [callback(export="0.10")], max_steps=5)
    trainer.train(resume_from_checkpoint=str(saved / "checkpoint-3"))
    exported = load_file(tmp_path / "run" / "ema_exports" / "0.1" / "model.safetensors")
    assert_same(exported, hf.by_hand(steps[:3] + recorder.steps, GAMMA))
    # Moved.
    shutil.copytree(saved, tmp_path / "moved")
    shutil.move(tmp_path / "moved", tmp_path / "again")
    marked = json.loads((tmp_path / "again" / "checkpoint-3" / "trainer_state.json").read_text())
    marked["stateful_callbacks"]["PostHocEMA"]["attributes"]["output"] = str(tmp_path / "moved")
    (tmp_path / "again" / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(marked))
    for given in ({}, {"resume_from": tmp_path / "again" / "checkpoint-3"}):
        averages = callback(run_dir=tmp_path / "new", **given)
        trainer, _ = hf.make_trainer(plain, tmp_path / "elsewhere", [averages], max_steps=5)
        if given:
            trainer.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-3"))
            assert averages.ema.t == 5
        else:
            with pytest.raises(StoreError, match=r"(?s)whose folder was not found: not at .*resume_from="):
                trainer.train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-3"))


def test_what_is_missing_to_resume_is_told(plain: hf.Mode, saved: Path, tmp_path: Path) -> None:
    trainer, _ = hf.make_trainer(plain, saved, [callback()])
    with pytest.raises(
        OrderError, match="holds the snapshots of an earlier training, up to 4, which this one does not"
    ):
        trainer.train()
    out = tmp_path / "bare"
    trainer, _ = hf.make_trainer(plain, out, [], max_steps=3, **SAVING)
    trainer.train()
    trainer, _ = hf.make_trainer(plain, out, [callback()])
    with pytest.raises(StoreError, match=r"step 3 .* was saved without averages"):
        trainer.train(resume_from_checkpoint=True)
    assert not (out / "ema").exists()
    late = callback(start=4)
    trainer, recorder = hf.make_trainer(plain, out, [late], **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert_same(rebuilt(out / "ema", "0.1", tmp_path / "late"), hf.by_hand(recorder.steps, GAMMA))
    shutil.rmtree(out / "checkpoint-6" / "ema")
    trainer, _ = hf.make_trainer(plain, out, [late], max_steps=8)
    with pytest.raises(StoreError, match="the checkpoint has no averages: saving it was cut short"):
        trainer.train(resume_from_checkpoint=True)


def test_what_cannot_be_is_told_before_training(plain: hf.Mode, tmp_path: Path) -> None:
    with pytest.raises(TargetError):
        callback(evaluate_with="0.9")
    with pytest.raises(TargetError, match="asked for twice"):
        callback(export=["0.1", "0.10"])
    with pytest.raises(TypeError, match="colour"):
        callback(colour="red")
    with pytest.raises(OrderError, match="training has not begun"):
        _ = callback().ema
    refused: list[tuple[PostHocEMACallback, type[PhemaError], str]] = [
        (callback(unit="tokens"), TargetError, "the Trainer counts no tokens"),
        (callback(unit="epochs"), TargetError, "expected one of steps, samples, tokens"),
    ]
    for averages, kind, message in refused:
        trainer, recorder = hf.make_trainer(plain, tmp_path, [averages])
        with pytest.raises(kind, match=message):
            trainer.train()
        assert not recorder.steps
    trainer, _ = hf.make_trainer(plain, tmp_path, [])
    trainer.add_callback(callback(evaluate_with="0.10"))
    with pytest.raises(OrderError, match="does not know the Trainer"):
        trainer.train()
    bare = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModel, match="Linear has no configuration"):
        callback(export="0.10").on_train_begin(trainer.args, trainer.state, trainer.control, model=bare)
    trial = TrainerState(is_hyper_param_search=True)
    with pytest.raises(OrderError, match="hp_name"):
        output_folder(trainer.args, trial)
    trial.trial_name = "first"
    assert output_folder(trainer.args, trial) == str(tmp_path / "first")


def test_trl_trains_with_it(plain: hf.Mode, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = hf.make_tokenizer()
    texts = ["one two three four five", "two four six eight", "one three five seven"] * 4
    averages = callback(evaluate_with="0.10", export="0.10", unit="tokens", snapshot_every=1)
    data = datasets.Dataset.from_dict({"text": texts})
    trainer = trl.SFTTrainer(
        model=hf.make_model(),
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            learning_rate=0.02,
            dataloader_pin_memory=False,
            include_num_input_tokens_seen="all",
            **SAVING | {"save_steps": 2},
            **EVALUATING,
        ),
        train_dataset=data,
        eval_dataset=data.select(range(3)),
        processing_class=tokenizer,
        callbacks=[averages],
    )
    recorder = hf.Recorder(plain)
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    averages.attach(trainer)
    trainer.train()
    assert averages.ema.t == trainer.state.num_input_tokens_seen > 0
    times = [snapshot.t for snapshot in open_run(tmp_path / "ema").snapshots]
    expected = hf.by_hand([(t, w) for t, (_, w) in zip(times, recorder.steps, strict=True)], GAMMA)
    folder = tmp_path / "ema_exports" / "0.1"
    assert_same(load_file(folder / "model.safetensors"), expected)
    assert any("eval_ema_0.10_loss" in entry for entry in trainer.state.log_history)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder)("two four").input_ids == tokenizer("two four").input_ids


TINY = ["--steps", 4, "--layers", 1, "--width", 32, "--length", 32, "--batch", 4]


@pytest.mark.parametrize(
    "script", ["hf_trainer_torchrun.sh", "hf_trainer_deepspeed.sh hf_zero3", "hf_trainer_fsdp2.sh"]
)
def test_launch_scripts_train_the_example(script: str, tmp_path: Path) -> None:
    if "deepspeed" in script:
        pytest.importorskip("deepspeed")
    words = script.split()
    printed = launched([ROOT / "launch" / words[0], *words[1:], "--out", tmp_path, *TINY])
    table = dict(line.rsplit(maxsplit=1) for line in printed.splitlines() if line.startswith("  "))
    assert [*table] == ["  weights", "  average 0.05", "  average 0.10", "  average 0.15"]
    assert all(4.0 < float(loss) < 6.0 for loss in table.values())  # four steps from ln 256 = 5.5
    assert [snapshot.t for snapshot in open_run(tmp_path / "ema").snapshots] == [1, 2, 3, 4]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ema_exports" / "0.15")
    assert type(model).__name__ == "GPT2LMHeadModel"


def launched(words: list[object]) -> str:
    """Standard output of a script, which and whose ranks end with the test."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PATH": path, "PYTHONPATH": python, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["RANKS"] = "2"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["MASTER_PORT"] = str(free.getsockname()[1])
    command = [str(word) for word in words]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as script:
        try:
            printed, said = script.communicate(timeout=240)
        except BaseException:
            os.killpg(script.pid, signal.SIGKILL)
            raise
    assert script.returncode == 0, printed + said
    return printed
