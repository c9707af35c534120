"""PostHocEMA: the running averages of one training run, kept beside its shards and stored as it goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sharded_phema.assembly import assembled
from sharded_phema.attachment import Advance, Attachment
from sharded_phema.errors import OrderError
from sharded_phema.filling import filler, one_of
from sharded_phema.leniency import leniency
from sharded_phema.per_tensor import Wanted
from sharded_phema.retention import Retention
from sharded_phema.scope import Buffers
from sharded_phema.state import Clock, fill_from_snapshot, load_state, state_of
from sharded_phema.store import Run, open_run
from sharded_phema.swap import weights_swapped
from sharded_phema.world import agree

__all__ = ["PostHocEMA"]


class PostHocEMA:
    """Running averages of a model's weights, from which averages of any other length can be rebuilt later.

    Each rank averages its own shards, in float32 whatever is stored; neither ``update`` nor ``snapshot``
    communicates. Made on every rank at once, after the model was sharded and moved.

    Args:
        model: A module, plain, inside DistributedDataParallel, or sharded with FSDP1, FSDP2 or tensor parallelism; or
            a DeepSpeed engine.
        root: Run folder on storage that all ranks share; made if missing. A folder that holds this run
            already is continued: restore the averages with ``load_state_dict`` or ``resume`` first.
        sigma_rels: Relative widths of the averages to keep, each in (0, 0.2886); without ``profiles`` 0.05 and 0.10.
        snapshot_every: Training time between snapshots, in ``unit``.
        unit: What training time counts, such as "steps", "samples" or "tokens".
        update_every: Least training time between updates; 0 updates at every call. Profiles stay exact.
        start: When averaging begins, in training time; uniform and corrected averages count from it or from their own.
        dtype: What snapshots are stored in: "float32", or at half the disk "float16", which refuses numbers above 65504
            in magnitude, or "bfloat16". ``sharded-phema plan --tolerance`` tells which will do for what is rebuilt.
        profiles: More averages to keep, each a width or a text: ``"power:gamma=6.94"``, ``"exponential:decay=0.9999"``
            (per one unit of training time, whatever the rhythm of updates; also ``halflife=7000`` or ``tau=10000``,
            then perhaps ``,ramp=0.05`` or ``,corrected``), ``"uniform"``, ``"uniform:start=75000"``.
        optimizer: ZeRO's, which keeps the float32 masters, beside a module that is not its engine, as callbacks get it.
        include: Patterns, as of file names, of the parameters to average. Others are copied into each snapshot as
            they are. Parameters that require no gradients are stored once, and again where they change.
        exclude: Patterns of parameters that are copied instead of averaged or stored once.
        buffers: ``"copy"`` persistent buffers into each snapshot, ``"average"`` the floating ones, or ``"omit"`` all.
        asynchronous: Hold training only while shards are copied to the host, and write beside it. One more copy of
            this rank's shards stays in host memory. A failure is raised by the next call.
        retention: Which snapshots to keep as training goes on: ``"0.03:0.25 tolerance=1e-2"``,
            ``"0.05:0.20 count=20"``, ``"0.1 bytes=10GB"``. All, unless it is said.
        on_error: ``"raise"`` when a snapshot cannot be stored, or ``"warn"`` and go on without it.
        timeout_s: Longest wait for another rank's part of a snapshot, in seconds.
        kernel: What updates the averages: ``"auto"``, ``"fused"``, ``"triton"``, ``"foreach"`` or ``"reference"``.
        non_finite: ``"skip"`` leaves out updates where this rank has NaN or infinity, ``"average"`` takes all.
        overlap: Update beside the training. Steps of torch's optimizers wait; ``wait`` before weights change otherwise.
        offload: Keep the averages in host memory and update them there, beside the training in the same sense.

    Raises:
        TargetError: A width, profile, rhythm or dtype is impossible, or an average is asked for twice.
        UnsupportedModel: A parameter cannot be mapped to local shards, or a tensor's dtype cannot be stored.
        ModelMismatch: The folder holds another model's run or one of another dtype, or the ranks hold different models.

    Source: Karras et al., arXiv:2312.02696, section 3.
    """

    def __init__(
        self,
        model: Any,
        root: str | Path,
        sigma_rels: Sequence[float] | None = None,
        snapshot_every: float = 1000,
        unit: str = "steps",
        *,
        update_every: float = 0,
        start: float = 0,
        dtype: str = "float32",
        profiles: Sequence[str | float] = (),
        optimizer: Any = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        buffers: Buffers = "copy",
        asynchronous: bool = False,
        retention: Retention | str | None = None,
        on_error: str = "raise",
        timeout_s: float = 600.0,
        kernel: str = "auto",
        non_finite: str = "average",
        overlap: bool = False,
        offload: bool = False,
    ) -> None:
        self._tried, self.root = leniency(on_error), os.fspath(root)
        scope = {"include": include, "exclude": exclude, "buffers": buffers}
        updates = {"kernel": kernel, "non_finite": non_finite, "overlap": overlap, "offload": offload}
        storing = {"asynchronous": asynchronous, "retention": retention, "timeout_s": timeout_s}
        rhythm, wanted = (update_every, snapshot_every, start), (sigma_rels, profiles)
        parts = assembled(model, optimizer, root, wanted, unit, dtype, rhythm, scope, updates, storing)
        self._tracked, self._mapped, self._averages, self._session, self._course = parts
        self._layout, self._attachment, self._busy = self._mapped.averaged, Attachment(), ""

    @property
    def t(self) -> float:
        """Training time of the last ``update``, in the run's unit."""
        return self._course.clock.t

    @property
    def begun(self) -> bool:
        """Whether anything was averaged yet."""
        return self._course.begun

    @property
    def unit(self) -> str:
        """What training time counts."""
        return self._session.record.unit

    @property
    def skipped(self) -> int:
        """How many updates this rank left out, with ``non_finite="skip"``. Asking waits for the device."""
        return self._averages.skipped

    def update(self, t: float | None = None) -> None:
        """Take the weights as they are now into every average. Call it after ``optimizer.step()``.

        A DeepSpeed engine tells how many steps changed the weights. Where none did since the last call (within gradient
        accumulation, or at an overflow) nothing happens: the next ``t`` holds the time that went by.

        Args:
            t: Training time, in the run's unit, later than at the last call by any amount; by 1 unless given.

        Raises:
            OrderError: Time does not advance, the averages were not restored, or the weights are swapped.
            StoreError: A snapshot was due and cannot be written.
        """
        self._check_ready("update")
        if self._course.advance(t, self.unit):
            self.snapshot()
        self._tried(self._session.check)

    def attach(self, optimizer: Any, advance: Advance = None) -> Attachment:
        """Have ``update`` called after each step that an optimizer makes, until ``remove()`` of what is returned.

        Args:
            optimizer: One of torch's, perhaps in accelerate's wrapper; of several, the one that steps last. Its state
                is loaded first: ``torch.distributed.checkpoint`` makes a step for that.
            advance: How far training time goes on at a step, in the run's unit: a number, or a function without
                arguments that gives it, asked after each step that no GradScaler skipped; 1 unless given.

        Raises:
            OrderError: It is attached already.
            UnsupportedModel: This is no optimizer of torch, or one that an engine steps.
            TargetError: ``advance`` is no number above 0.
        """
        self._check_ready("attach")
        self._course.check_uncounted()
        return self._attachment.begin(optimizer, advance, lambda by: self.update(self.t + by))

    def wait(self) -> None:
        """Wait for an update beside the training. Optimizers do so themselves, before they write weights."""
        self._averages.wait()

    def snapshot(self) -> str:
        """Store the averages as of now. Every rank must call it; each writes its own shards.

        Returns:
            Where it lies, a path or URL; nothing where it failed and ``on_error`` is "warn". A second call at the same
            training time stores nothing and gives the same place.

        Raises:
            OrderError: Nothing was averaged yet, or the weights are swapped.
            StoreError: This rank's part cannot be written, or a number is too large for the run's dtype; earlier
                snapshots are intact.
            ModelMismatch: A buffer or frozen parameter has another shape or dtype than when this object was made.
        """
        self._check_ready("snapshot")
        return self._session.latest if self._tried(self._snapshot) else ""

    def _snapshot(self) -> None:
        self._course.catch_up()
        self._course.check_begun("snapshot")
        self._session.snapshot(self._course.clock, self._averages_by_label(), check=self._averages.check)

    @contextmanager
    def swapped(
        self, target: Wanted | None = None, *, sigma_rel: float | None = None, offload: bool = False
    ) -> Iterator[None]:
        """Have the model compute with an average; its own weights are back, bit for bit, on any exit.

        A tracked average is swapped in as it is now. Any other target is rebuilt from this run's snapshots, as of
        the last one, each rank reading its own boxes. Every rank must swap. Buffers that are not averaged stay.

        Args:
            target: ``0.10``, ``"exponential:decay=0.9999"``, ``"decay:linear:0.2"``, ``"0.07@t=5000"``, or a
                mapping from patterns of parameter names to targets.
            sigma_rel: The same, as a width.
            offload: Keep the model's own weights on the CPU meanwhile, where memory beside the shards is short.

        Raises:
            OrderError: Nothing was averaged yet, or a swap is under way.
            TargetError: The target is none, or cannot be rebuilt at its time.
            StoreError: It is not tracked, and the snapshots are missing or damaged.
        """
        self._check_ready("swapped")
        self._averages.check()
        self._course.check_begun("swapped")
        fill = filler(one_of(target, sigma_rel), self._tracked, self._averages, self._layout, stored=self._stored_run)
        self._busy = "the weights are swapped for an average"
        try:
            with weights_swapped(self._layout, self._mapped.shared, fill, self._mapped.publish, offload=offload):
                yield
        finally:
            self._busy = ""

    def state_dict(self) -> dict[str, Any]:
        """Everything that continuing bit for bit needs, for ``torch.distributed.checkpoint.save``.

        Tensors alias the averages: save before the next update. Any world size can load them, by name and global shape.
        """
        self._averages.check_filled()
        return state_of(self._course.clock, self._averages_by_label())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state that ``state_dict`` gave, on this or another world size.

        Snapshots later than the state's training time are left behind, never overwritten.

        Raises:
            ModelMismatch: Averages or parameters differ; nothing is changed then.
        """
        self._restore(lambda averages: load_state(state_dict, averages))

    def resume(self, t: float | None = None) -> float:
        """Continue, on every rank, from a snapshot alone: the one at ``t``, or the last; gives its training time.

        A run that stores float16 or bfloat16 goes on from averages rounded to it. Where the averages must be those of
        an uninterrupted run to the last bit, load the checkpoint's ``state_dict``, which is float32, instead.

        Raises:
            StoreError: There is no such snapshot, or it is damaged.
        """
        self._restore(lambda averages: agree(lambda: fill_from_snapshot(open_run(self.root), t, averages)))
        return self.t

    def close(self) -> None:
        """Store what the last snapshot does not hold yet, wait until it is stored, and end. Closing twice is harmless.

        Raises:
            StoreError: That failed, and nothing was ended: call it again once there is room. Or one that was written
                beside the training failed before; then all was ended.
        """
        if self._busy == "closed":
            return
        if self._busy:
            self._check_ready("close")
        earlier = self._session.settled()
        self._tried(self._store_the_rest)
        self._busy = "closed"
        self._attachment.remove()
        self._averages.close()
        self._session.close()
        self._tried(earlier)

    def _store_the_rest(self) -> None:
        self._course.catch_up()
        if self._course.begun and self._session.lacks(self.t):
            self._snapshot()
        self._session.wait()

    def __enter__(self) -> PostHocEMA:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()

    def _averages_by_label(self) -> dict[str, Any]:
        return {label: self._averages.layout(index) for index, label in enumerate(self._session.record.averages)}

    def _restore(self, fill: Callable[[dict[str, Any]], Clock]) -> None:
        if self._busy or self._session.stored:
            raise OrderError(
                "restoring: this object has stored snapshots or is in use",
                hint="restore right after making PostHocEMA, before the first update",
            )
        self._course.continue_at(fill(self._averages_by_label()))
        self._session.continue_at(self.t)

    def _stored_run(self) -> Run:
        """The run, once its last snapshot is in storage whole."""
        self._tried(self._session.wait)
        return self._session.run()

    def _check_ready(self, act: str) -> None:
        if self._busy:
            raise OrderError(f"{act}: {self._busy}", hint="leave the swapped block first, or make a new PostHocEMA")
        self._session.check_restored(act)
