"""Training time as a Trainer lets its callbacks know it: in steps, samples or tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sharded_phema.errors import TargetError

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

__all__ = ["TrainingTime", "check_unit"]

UNITS = ("steps", "samples", "tokens")


def check_unit(unit: str, args: TrainingArguments) -> None:
    """Prove that the Trainer counts what time is measured in.

    Raises:
        TargetError: It does not.
    """
    if unit not in UNITS:
        raise TargetError(f"unit={unit!r}: expected one of {', '.join(UNITS)}", hint='leave it out for "steps"')
    if unit == "tokens" and str(args.include_num_input_tokens_seen) in ("no", "False"):
        raise TargetError(
            'unit="tokens": the Trainer counts no tokens',
            hint='set TrainingArguments(include_num_input_tokens_seen="all"), or "non_padding"',
        )


class TrainingTime:
    """Training time after each optimizer step that was not skipped.

    Args:
        unit: "steps", "samples" or "tokens".
        args: Of the Trainer.
        state: Of the Trainer, where its training begins.
        dataloader: Of training, as accelerate prepared it.

    Attributes:
        t: Training time now; one that resumes sets it.
    """

    def __init__(self, unit: str, args: TrainingArguments, state: TrainerState, dataloader: Any) -> None:
        self._unit, self._processes = unit, args.world_size
        # Accelerate's loaders know how many samples all ranks take at once, tensor parallelism considered.
        batch = getattr(dataloader, "total_batch_size", None) or (state.train_batch_size or 1) * args.world_size
        self._batch = int(batch)
        self._batches, self._tokens = 0, state.num_input_tokens_seen
        samples = state.global_step * args.gradient_accumulation_steps * self._batch
        self.t = float({"steps": state.global_step, "samples": samples, "tokens": self._tokens}[unit])

    def count_batch(self) -> None:
        """Count a batch of each rank."""
        self._batches += 1

    def advance(self, state: TrainerState, optimizer: Any) -> bool:
        """Go on by the optimizer step that was just tried.

        Args:
            state: Of the Trainer.
            optimizer: As accelerate wrapped it.

        Returns:
            Whether time went on: neither after a step that was skipped, nor after one without tokens.
        """
        amount = {"steps": 1, "samples": self._samples(optimizer), "tokens": state.num_input_tokens_seen - self._tokens}
        self._batches, self._tokens = 0, state.num_input_tokens_seen
        went = not getattr(optimizer, "step_was_skipped", False) and amount[self._unit] > 0
        self.t += amount[self._unit] if went else 0
        return went

    def _samples(self, optimizer: Any) -> int:
        """Samples of the batches since the last step.

        One process ends an epoch with what is left; several fill up their last batches with samples of its beginning.
        """
        progress = getattr(optimizer, "gradient_state", None)
        left = int(progress.remainder) if progress is not None and progress.end_of_dataloader else 0
        return self._batches * self._batch - (self._batch - left if left > 0 and self._processes == 1 else 0)
