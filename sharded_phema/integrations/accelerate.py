"""accelerate: averages of a prepared model, which keep to its gradient accumulation and go into its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from accelerate import Accelerator

from sharded_phema.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from sharded_phema.errors import OrderError, StoreError
from sharded_phema.posthoc import PostHocEMA

__all__ = ["AcceleratedEMA", "prepare_ema"]

_FOLDERS: WeakKeyDictionary[Accelerator, set[str]] = WeakKeyDictionary()
"""Folders, in the checkpoints of each accelerator, that averages go into."""


def prepare_ema(
    accelerator: Accelerator,
    model: Any,
    root: str | Path,
    sigma_rels: Sequence[float] | None = None,
    snapshot_every: float = 1000,
    unit: str = "steps",
    *,
    folder: str = "ema",
    **options: Any,
) -> AcceleratedEMA:
    """Keep averages of a model, and have ``save_state`` and ``load_state`` take them along. Collective.

    Args:
        accelerator: What prepared the model.
        model: As ``accelerator.prepare`` returned it, whatever that is: inside DistributedDataParallel, sharded with
            FSDP2 or FSDP1, or a DeepSpeed engine.
        root: Run folder, as of ``PostHocEMA``, like the next three.
        sigma_rels: Relative widths.
        snapshot_every: Training time between snapshots.
        unit: What training time counts.
        folder: Where averages lie in a checkpoint; each model of several needs its own.
        options: More arguments of ``PostHocEMA``.

    Raises:
        PhemaError: As of ``PostHocEMA``.
        OrderError: Other averages go into that folder already.
    """
    taken = _FOLDERS.setdefault(accelerator, set())
    if folder in taken:
        raise OrderError(
            f"prepare_ema: averages of this accelerator go into {folder!r} of its checkpoints already",
            hint="name another folder for those of another model, or close() the earlier ones",
        )
    ema = PostHocEMA(model, root, sigma_rels, snapshot_every, unit, **options)
    taken.add(folder)
    return AcceleratedEMA(accelerator, ema, folder)


class AcceleratedEMA:
    """Averages and the accelerator whose loop they follow; made by ``prepare_ema``.

    Attributes:
        ema: The averages themselves, for ``swapped``, ``snapshot`` and so on.
    """

    def __init__(self, accelerator: Accelerator, ema: PostHocEMA, folder: str) -> None:
        self.ema = ema
        self._accelerator, self._folder = accelerator, folder
        # Called on every rank; accelerate has then made the folder, and what it loads has been loaded or is plain.
        self._hooks = (
            accelerator.register_save_state_pre_hook(lambda models, weights, place: self._save(Path(place))),
            accelerator.register_load_state_pre_hook(lambda models, place: self._load(Path(place))),
        )

    @property
    def t(self) -> float:
        """Training time of the last update, in the run's unit."""
        return self.ema.t

    def update(self, t: float | None = None) -> None:
        """Take the weights in, if the step before was one: within gradient accumulation and at overflows it was not.

        Call it after each ``optimizer.step()``.

        Args:
            t: Training time; one more than at the last update unless given. What went by since then belongs to the
                weights that the next real step makes.

        Raises:
            PhemaError: As of ``PostHocEMA.update``.
        """
        if self._accelerator.sync_gradients and not self._accelerator.optimizer_step_was_skipped:
            self.ema.update(t)

    def close(self) -> None:
        """Store what the last snapshot does not hold yet, and end; checkpoints are without averages from now on.

        Raises:
            StoreError: As of ``PostHocEMA.close``.
        """
        self.ema.close()
        for hook in self._hooks:
            hook.remove()
        _FOLDERS.get(self._accelerator, set()).discard(self._folder)

    def __enter__(self) -> AcceleratedEMA:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()

    def _save(self, checkpoint: Path) -> None:
        save_checkpoint(self.ema, checkpoint / self._folder)

    def _load(self, checkpoint: Path) -> None:
        if not has_checkpoint(checkpoint / self._folder):
            raise StoreError(
                f"{checkpoint}: expected averages in {self._folder!r}, found none",
                hint="to begin averages in a run that is under way, call prepare_ema after load_state",
            )
        load_checkpoint(self.ema, checkpoint / self._folder)
