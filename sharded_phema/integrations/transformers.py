"""PostHocEMACallback: post-hoc averages in the Trainer of Hugging Face transformers, and in those of trl."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from sharded_phema.checkpoint import load_checkpoint, save_checkpoint
from sharded_phema.errors import OrderError
from sharded_phema.integrations.hf_checkpoints import check_new, folder_of_averages, mark, output_folder, resumed_from
from sharded_phema.integrations.hf_evaluation import also_with_averages
from sharded_phema.integrations.hf_export import check_exportable, export_averages
from sharded_phema.integrations.hf_time import TrainingTime, check_unit
from sharded_phema.per_tensor import Wanted, parse_outputs
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.target import parse_target
from sharded_phema.tracked import asked_for, tracked_set
from sharded_phema.world import from_first

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = ["PostHocEMACallback"]

Targets = Wanted | Sequence[Wanted]
"""One target or several."""

UNNAMEABLE = str.maketrans("@:=,", "----")


class PostHocEMACallback(TrainerCallback):
    """Keeps averages of a Trainer's model in a run folder, from which any other can be rebuilt later.

    Works with one process, DDP, FSDP1 and FSDP2, and DeepSpeed ZeRO. Averages are updated once an optimizer step,
    however many batches it takes. Steps that are skipped, as after an overflow, do not count, in whatever unit:
    ``ema.t`` then lags behind ``state.global_step``. One callback a Trainer: ``profiles`` takes more averages.

    Every ``checkpoint-N`` gets a folder ``ema`` with the exact state, each rank its own shards, and a Trainer that
    resumes goes on from there bit for bit, on any number of ranks. At the end, what the last snapshot does not hold is
    stored before ``load_best_model_at_end`` replaces the weights.

    Args:
        run_dir: Run folder, path or URL; ``<output_dir>/ema`` unless given.
        sigma_rels: As of ``PostHocEMA``.
        snapshot_every: Training time between snapshots, in ``unit``.
        evaluate_with: Targets that the Trainer evaluates too whenever it evaluates while it trains, each in the place
            of the weights. Metrics of ``"0.10"`` begin with ``eval_ema_0.10_``; ``metric_for_best_model`` may name
            one. Needs the Trainer. For a target that is not tracked a snapshot is taken first, to rebuild it from.
        export: Targets to write at the end, each into ``<output_dir>/ema_exports/<target>``, in float32 with the
            model's configuration and tokenizer, as ``from_pretrained`` reads it. What an earlier end of the run made
            there is replaced.
        trainer: The Trainer, for ``evaluate_with``; ``attach`` gives it later.
        unit: What training time counts: "steps"; "samples"; or "tokens", the Trainer's own count, which needs
            ``include_num_input_tokens_seen``. Samples are counted by batches: exactly, but for batches that a
            dataset of unknown length ends with. Those which several processes repeat to fill a last batch count again.
        resume_from: The checkpoint folder that the Trainer resumes from. It is found unless that was moved and lies
            outside ``output_dir``.
        options: More arguments of ``PostHocEMA``, such as ``update_every``, ``start``, ``dtype`` and ``asynchronous``.

    Raises:
        TargetError: A target or the unit is none.
    """

    def __init__(
        self,
        run_dir: str | Path | None = None,
        sigma_rels: Sequence[float] | None = None,
        snapshot_every: float = 1000,
        *,
        evaluate_with: Targets | None = None,
        export: Targets = (),
        trainer: Trainer | None = None,
        unit: str = "steps",
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        self._run_dir, self._resume_from = run_dir, resume_from
        self._options = {"sigma_rels": sigma_rels, "snapshot_every": snapshot_every, "unit": unit} | options
        signature(PostHocEMA).bind("model", "root", optimizer=None, **self._options)  # before hours of loading data
        self._start = float(options.get("start", 0))
        self._tracked = tracked_set(asked_for(sigma_rels, options.get("profiles", ())), self._start)
        self._evaluated, self._exported = _by_name(evaluate_with or ()), [*_by_name(export).values()]
        self._ema: PostHocEMA | None = None
        self._training = False
        self._trainers: weakref.WeakSet[Trainer] = weakref.WeakSet()
        if trainer is not None:
            self.attach(trainer)

    @property
    def ema(self) -> PostHocEMA:
        """The averages, from the beginning of training on; closed at its end.

        Raises:
            OrderError: Training has not begun.
        """
        if self._ema is None:
            raise OrderError("ema: training has not begun", hint="the averages are made when trainer.train() begins")
        return self._ema

    def attach(self, trainer: Trainer) -> None:
        """Have the evaluations of a Trainer cover the averages of ``evaluate_with`` too. Again is harmless."""
        if trainer not in self._trainers:
            also_with_averages(trainer, self._swaps)
            self._trainers.add(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Make the averages, and restore them where training resumes. Called by all ranks.

        Raises:
            PhemaError: What was asked for cannot be, the state to resume from is missing, or the run folder holds
                another run.
        """
        model = given["model"]
        self._check(args, state, model)
        output = output_folder(args, state)
        root = os.path.join(output, "ema") if self._run_dir is None else self._run_dir
        time = TrainingTime(self._options["unit"], args, state, given["train_dataloader"])
        source = resumed_from(args, state, output, self._resume_from, averaging=time.t >= self._start)
        if not source:
            from_first(lambda: check_new(root))
        # Averages of an earlier training that was cut short stay as they are stored.
        self._ema = PostHocEMA(model, root, optimizer=given["optimizer"], **self._options)
        if source:
            time.t = load_checkpoint(self._ema, folder_of_averages(source))
        mark(state, output)
        self._time, self._output, self._training = time, output, True

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Count a batch whose gradients are accumulated."""
        self._time.count_batch()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Take the weights into the averages, unless the step was skipped."""
        self._time.count_batch()
        if self._time.advance(state, given["optimizer"]):
            self.ema.update(self._time.t)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Store the averages beside the Trainer's checkpoint. Called by all ranks."""
        if self._training:
            checkpoint = os.path.join(self._output, f"checkpoint-{state.global_step}")
            save_checkpoint(self.ema, folder_of_averages(checkpoint))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """End the averages once the Trainer logs its last figures: next, it may load the best weights."""
        if {"train_loss", "total_flos"} <= given["logs"].keys():
            self._finish()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Write the exports.

        Raises:
            OrderError: The end of training was not logged, and the weights are those of the best checkpoint by now.
            PhemaError: An average cannot be stored or rebuilt.
        """
        replaced = args.load_best_model_at_end and state.best_model_checkpoint and not state.is_hyper_param_search
        if self._training and replaced:
            raise OrderError(
                "on_train_end: the Trainer loaded its best checkpoint before the last averages could be stored: "
                "it did not tell its callbacks of its last log",
                hint="have the log method of your Trainer call super().log; earlier snapshots are intact",
            )
        self._finish()
        if self._exported and self._ema:
            out = os.path.join(self._output, "ema_exports")
            export_averages(self._ema.root, self._exported, out, given["model"], given["processing_class"])

    def _finish(self) -> None:
        if self._training:
            self._training = False
            self.ema.close()

    def _check(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        check_unit(self._options["unit"], args)
        if self._exported:
            check_exportable(model)
        if self._evaluated and all(trainer.state is not state for trainer in self._trainers):
            raise OrderError(
                f"evaluate_with={[*self._evaluated]}: the callback does not know the Trainer that trains",
                hint="call callback.attach(trainer) before trainer.train(), or give it trainer=trainer",
            )

    def _swaps(self) -> Mapping[str, AbstractContextManager[None]]:
        """What is evaluated besides the weights now, by name; nothing before the first update and after training."""
        if not (self._evaluated and self._training and self.ema.begun):
            return {}
        return {name: self._swapped(target) for name, target in self._evaluated.items()}

    @contextmanager
    def _swapped(self, target: Wanted) -> Iterator[None]:
        if isinstance(target, Mapping) or self._tracked.find(parse_target(target)) is None:
            self.ema.snapshot()  # what is rebuilt is as of the last one
        with self.ema.swapped(target):
            yield


def _by_name(targets: Targets) -> dict[str, Wanted]:
    """Each target by its name in metrics and messages: a text as it was spelled, without what a name cannot hold.

    Raises:
        TargetError: One of them is none, or two are the same.
    """
    several: list[Wanted] = [targets] if isinstance(targets, str | float | int | Mapping) else [*targets]
    slugs = [output.slug for output in parse_outputs(several)] if several else []
    spelled = [
        text.translate(UNNAMEABLE) if isinstance(text, str) else slug for text, slug in zip(several, slugs, strict=True)
    ]
    return dict(zip(spelled, several, strict=True))
