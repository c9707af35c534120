"""Lightning: a callback that keeps running averages beside a Trainer, whatever its strategy.

    trainer = Trainer(strategy="fsdp", callbacks=[PostHocEMACallback(snapshot_every=1000, evaluate_with="0.10")])

Tested with lightning 2.6.6 and the strategies ``SingleDeviceStrategy``, ``DDPStrategy``, ``FSDPStrategy`` (FSDP1),
``ModelParallelStrategy`` (FSDP2, tensor parallelism) and ``DeepSpeedStrategy`` (ZeRO 1 to 3). Tensors are named as the
LightningModule names them, without what a strategy puts before: ``MyModule().load_state_dict`` takes what is rebuilt
(with ``strict=False`` where weights are tied: one of them is stored).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities.data import extract_batch_size
except ImportError:  # the same library under its older name
    from pytorch_lightning import Callback  # type: ignore[assignment]
    from pytorch_lightning.utilities.data import extract_batch_size

from sharded_phema.errors import OrderError, OutputError, TargetError
from sharded_phema.folder import open_folder
from sharded_phema.integrations.states import restore_state, save_state
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct
from sharded_phema.store import open_run, run_exists
from sharded_phema.target import parse_target, parse_targets
from sharded_phema.world import from_first

__all__ = ["PostHocEMACallback"]

Count = Callable[[Any], float]
"""Training time that a batch of this rank takes."""


class PostHocEMACallback(Callback):
    """Averages the weights after each optimizer step, from which averages of any other length can be rebuilt later.

    Gradient accumulation is honoured, and steps that DeepSpeed or the scaler of ``precision="16-mixed"`` skips do not
    count. Where ``training_step`` steps several times (manual optimization), weights are taken once at its end, and
    time advances by the number of steps.

    A Lightning checkpoint holds where the state of the averages lies, not their tensors: those are written by each
    rank for itself, without a gather, into ``<run_dir>-checkpoints``. ``trainer.fit(ckpt_path=...)`` goes on with them
    bit for bit, on another number of ranks too. Of a checkpoint that was made without a state (after training ended) or
    whose state went with ``keep``, a snapshot of the same training time serves, rounded to the run's ``dtype``.

    Args:
        run_dir: Run folder, a path or URL that all ranks share. Unless given, that of the checkpoint that is resumed
            from, or else ``ema`` in ``trainer.log_dir``: beside the logger's files, a new one for each new version.
        sigma_rels: As ``PostHocEMA`` takes it.
        snapshot_every: Training time between snapshots, in ``unit``.
        evaluate_with: Target whose weights are in the model during ``trainer.fit``'s validation, such as "0.10";
            metrics keep their names and are those of the average, while checkpoints hold the weights in training. A
            target that is not tracked is rebuilt as of the last snapshot, and so needs one.
        export: Targets that are rebuilt when training ends, into ``<run_dir>-exports/<target>/model.safetensors``,
            where an earlier export is replaced.
        unit: "steps", "samples" or "tokens". The latter two sum one number over all ranks at each step.
        count: Time that a batch of this rank takes. Samples are counted as Lightning counts them, tokens as the
            elements of ``batch["input_ids"]``, unless it is given.
        keep: How many states of the averages stay beside checkpoints, the latest ones; -1 keeps all. Raise it with
            ``ModelCheckpoint(save_top_k=...)`` if training shall go on from older checkpoints. A state takes as much
            room as a float32 snapshot. States of steps after the one that is resumed from are left alone.
        options: More for ``PostHocEMA``.

    Raises:
        TargetError: A target, unit or number is impossible.
    """

    def __init__(
        self,
        run_dir: str | Path | None = None,
        sigma_rels: Sequence[float] | None = None,
        snapshot_every: float = 1000,
        *,
        evaluate_with: str | float | None = None,
        export: Sequence[str | float] = (),
        unit: str = "steps",
        count: Count | None = None,
        keep: int = 2,
        **options: Any,
    ) -> None:
        if unit not in _COUNTS:
            raise TargetError(f"unit: expected one of {', '.join(_COUNTS)}, found {unit!r}", hint="name one of them")
        if keep < 1 and keep != -1:
            raise TargetError(f"keep: expected at least 1, or -1, found {keep}", hint="-1 keeps the state of each save")
        self._targets = [str(target.text) for target in parse_targets(export)] if export else []
        self._evaluate_with = None if evaluate_with is None else parse_target(evaluate_with).text
        self._run_dir = None if run_dir is None else os.fspath(run_dir)
        self._options = {**options, "sigma_rels": sigma_rels, "snapshot_every": snapshot_every, "unit": unit}
        self._count, self._keep = count or _COUNTS[unit], keep
        self._ema: PostHocEMA | None = None
        self._state: dict[str, Any] = {}
        self._swap = ExitStack()
        self._swapped = False

    @property
    def ema(self) -> PostHocEMA:
        """The averages, from the start of training to its end.

        Raises:
            OrderError: There are none now.
        """
        if self._ema is None:
            raise OrderError(
                "ema: there are averages only while trainer.fit trains",
                hint="rebuild them from the run folder with sharded_phema.reconstruct or load_into",
            )
        return self._ema

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget the checkpoint of an earlier fit."""
        if stage == "fit":
            self._state = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note what the checkpoint tells; the averages do not exist yet."""
        self._state = dict(state_dict)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the averages, or continue them: by now every strategy has sharded, moved and loaded the model.

        Raises:
            OrderError: The folder holds another training's run.
            StoreError: The state that the checkpoint names is not there.
        """
        root = self._root(trainer)
        from_first(lambda: self._check_root(root))
        self._ema = PostHocEMA(trainer.strategy.model, root, **self._options)
        self._made, self._scale, self._waiting = _steps_made(trainer), _scale(trainer), 0.0
        self._t = float(self._made) if self._ema.unit == "steps" else 0.0
        if self._state:
            restore_state(self._ema, self._state)
            self._t = self._ema.t
        self._session = from_first(lambda: uuid.uuid4().hex[:8])
        self._state = {"run_dir": root, "saved": self._state.get("saved", []), "t": self._t, "state": ""}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the averages, if this batch ended in a step of the optimizer."""
        by_steps, made = self.ema.unit == "steps", _steps_made(trainer)
        self._waiting += 0.0 if by_steps else self._count(batch)
        steps, self._made = made - self._made, made
        before, self._scale = self._scale, _scale(trainer)
        # A scaler lowers its scale when it finds infinite gradients and leaves the step out, and only then.
        if steps and self._scale >= before:
            self._t += float(steps) if by_steps else _summed(trainer, self._waiting)
            self._waiting = 0.0
            self.ema.update(self._t)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the average in the place of the weights, if validation shall use one and there is one."""
        # The check of validation before training, and trainer.validate, find no averages and use the weights.
        if self._evaluate_with is not None and self._ema is not None and self._ema.begun:
            self._swap.enter_context(self._ema.swapped(self._evaluate_with))
            self._swapped = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the weights back, before a ``ModelCheckpoint``, which Lightning calls last, saves them."""
        self._swapped = False
        self._swap.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the weights back when validation failed."""
        self.on_validation_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Store the averages beside, each rank its shards, and their place in the checkpoint. Collective.

        Raises:
            OrderError: The weights are swapped, so that the checkpoint would hold an average in their place.
            StoreError: The state cannot be written.
        """
        if self._swapped:
            raise OrderError(
                f"a checkpoint during validation would hold the average {self._evaluate_with} instead of the weights",
                hint="save in on_validation_end or later, or leave evaluate_with out",
            )
        if self._ema is not None:
            self._state = save_state(self._ema, self._state, self._session, self._keep)
        if self._state:
            checkpoint.setdefault("callbacks", {})[self.state_key] = dict(self._state)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Store what the last snapshot does not hold, and rebuild what shall be exported. Collective."""
        ema, self._ema = self.ema, None
        ema.close()
        if self._state["t"] != ema.t:
            self._state = {**self._state, "t": ema.t, "state": ""}
        if self._targets:
            reconstruct(ema.root, self._targets, out=f"{ema.root}-exports", force=True)

    def _root(self, trainer: Any) -> str:
        """Run folder, the same on all ranks."""
        found = self._run_dir or self._state.get("run_dir") or os.path.join(trainer.log_dir, "ema")
        root = from_first(lambda: found if "://" in found else os.path.abspath(found))
        if self._targets and "://" in root:
            raise OutputError(
                f"export: expected a run folder that is a path, found {root}",
                hint="leave export out, and rebuild with sharded-phema reconstruct --out FOLDER",
            )
        return root

    def _check_root(self, root: str) -> None:
        """Prove that nothing of another training lies there."""
        folder = open_folder(root)
        if not self._state and run_exists(folder) and (found := open_run(folder).snapshots):
            raise OrderError(
                f"{root} holds a run up to {found[-1].t:g}, and this training does not go on from a checkpoint of it",
                hint="resume with trainer.fit(ckpt_path=...), or give this training its own folder with run_dir=",
            )


def _steps_made(trainer: Any) -> int:
    """Optimizer steps so far. DeepSpeed's engine counts them itself: it accumulates across epochs, and skips some."""
    engine = trainer.strategy.model
    if hasattr(engine, "skipped_steps"):
        return int(engine.global_steps - engine.skipped_steps)
    return int(trainer.global_step)


def _scale(trainer: Any) -> float:
    """Loss scale of mixed precision in float16, 1 without it."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _summed(trainer: Any, amount: float) -> float:
    """What all ranks together were given; ranks of one tensor-parallel group are given the same. Collective."""
    strategy = trainer.strategy
    groups = getattr(strategy, "distributed_sampler_kwargs", {"num_replicas": 1})["num_replicas"]
    total = torch.tensor(amount, dtype=torch.float64, device=strategy.root_device)
    return float(strategy.reduce(total, reduce_op="sum")) * float(groups) / float(trainer.world_size)


def _tokens(batch: Any) -> float:
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise TargetError(
            f"tokens: expected a batch with input_ids, found {type(batch).__name__}",
            hint="give count=, a function from a batch to its number of tokens",
        )
    return float(batch["input_ids"].numel())


_COUNTS: dict[str, Count] = {"steps": lambda batch: 0.0, "samples": extract_batch_size, "tokens": _tokens}
