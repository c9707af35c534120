"""Where the averages of a Trainer's checkpoints lie, and which checkpoint it resumed from."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sharded_phema.checkpoint import has_checkpoint
from sharded_phema.errors import OrderError, StoreError
from sharded_phema.folder import open_folder
from sharded_phema.store import open_run, run_exists
from sharded_phema.world import from_first

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

__all__ = ["check_new", "folder_of_averages", "mark", "output_folder", "resumed_from"]

KEY = "PostHocEMA"
"""Our entry in the Trainer's state. No class has this name: the Trainer makes no callback of it."""


def output_folder(args: TrainingArguments, state: TrainerState) -> str:
    """Where the Trainer puts its checkpoints: of a hyperparameter search, the trial's own folder.

    Raises:
        OrderError: A trial without a name.
    """
    if state.is_hyper_param_search and not state.trial_name:
        raise OrderError(
            "a hyperparameter search whose trials have no names: each needs a run folder of its own",
            hint="give trainer.hyperparameter_search(hp_name=...)",
        )
    return os.path.join(str(args.output_dir), state.trial_name or "")


def folder_of_averages(checkpoint: str) -> str:
    """Where a checkpoint has its averages."""
    return os.path.join(checkpoint, "ema")


def check_new(root: str | Path) -> None:
    """Prove that a run folder holds no snapshots. Called by one rank.

    Raises:
        OrderError: It does.
        StoreError: It is damaged.
    """
    folder = open_folder(root)
    if run_exists(folder) and (snapshots := open_run(folder).snapshots):
        raise OrderError(
            f"{folder.url}: holds the snapshots of an earlier training, up to {snapshots[-1].t:.17g}, which this one "
            "does not resume",
            hint="trainer.train(resume_from_checkpoint=True) goes on with it; a new one needs its own folder",
        )


def mark(state: TrainerState, output: str) -> None:
    """Have all checkpoints of this training tell whose they are."""
    attributes = {"session": uuid.uuid4().hex, "output": os.path.abspath(output)}
    _callbacks_in(state)[KEY] = {"args": {}, "attributes": attributes}


def resumed_from(
    args: TrainingArguments, state: TrainerState, output: str, given: str | Path | None, *, averaging: bool
) -> str:
    """The checkpoint folder that the Trainer resumed from; empty where there is nothing to resume. Collective.

    The Trainer tells its callbacks what lies in that folder, not where it is. Places where it may be are held
    against that, so that averages of another training are never taken.

    Args:
        args: Of the Trainer.
        state: As the Trainer read it from the checkpoint.
        output: Where the Trainer puts checkpoints.
        given: The folder, if the user said which.
        averaging: Whether there would be averages by now.

    Raises:
        StoreError: The folder cannot be found, or holds no averages.
    """
    marked = _mark_in(_callbacks_in(state))
    if state.global_step == 0 or not (marked or given or averaging):
        return ""
    places = _places(args, state, output, marked) if given is None else [os.fspath(given)]
    found = from_first(lambda: next((place for place in places if _facts(place) == (state.global_step, marked)), ""))
    if not (marked or given):
        raise StoreError(
            f"the checkpoint of step {state.global_step} that training resumes from was saved without averages",
            hint="resume from one that this callback saved; or begin averaging with start=..., later than now",
        )
    if not found:
        raise StoreError(
            f"training resumes at step {state.global_step} from a checkpoint whose folder was not found: not at "
            + " nor at ".join(places),
            hint="give PostHocEMACallback(resume_from=...) the checkpoint folder that trainer.train was given",
        )
    if not has_checkpoint(folder_of_averages(found)):
        raise StoreError(
            f"{folder_of_averages(found)}: the checkpoint has no averages: saving it was cut short",
            hint="resume from an earlier checkpoint",
        )
    return found


def _places(args: TrainingArguments, state: TrainerState, output: str, marked: dict[str, str]) -> Sequence[str]:
    """Where the checkpoint may be: here, where the command line says, or where it was written."""
    name = f"checkpoint-{state.global_step}"
    asked = [str(args.resume_from_checkpoint)] if args.resume_from_checkpoint else []
    written = [os.path.join(marked["output"], name)] if marked else []
    return list(dict.fromkeys([os.path.abspath(os.path.join(output, name)), *asked, *written]))


def _facts(place: str) -> tuple[int, dict[str, str]] | None:
    """Step and mark of a checkpoint; none where there is none."""
    try:
        state = json.loads(Path(place, "trainer_state.json").read_text())
        return state["global_step"], _mark_in(state["stateful_callbacks"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _callbacks_in(state: TrainerState) -> dict[str, Any]:
    """States of callbacks by the names of their classes, whatever the annotation says."""
    return state.stateful_callbacks  # type: ignore[return-value]


def _mark_in(callbacks: dict[str, Any]) -> dict[str, str]:
    """The mark among the states of callbacks; empty where there is none."""
    return dict(callbacks.get(KEY, {}).get("attributes", {}))
