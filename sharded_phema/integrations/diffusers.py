"""diffusers: EMAModel as its training scripts use it, on top of PostHocEMA."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sharded_phema.backends import backend_of
from sharded_phema.checkpoint import load_checkpoint, save_checkpoint
from sharded_phema.errors import OrderError, TargetError, UnsupportedModel
from sharded_phema.integrations.choice import Choice
from sharded_phema.integrations.skeleton import empty_model, local_part, names_of, save_model, skeleton, write_averages
from sharded_phema.posthoc import PostHocEMA
from sharded_phema.rebuild import reconstruct
from sharded_phema.target import parse_target
from sharded_phema.world import agree, alone, from_first, rank_and_size

__all__ = ["EMAModel"]

Parameters = Iterable[nn.Parameter] | nn.Module

NUMBERS = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
"""What of the state goes into the configuration of a saved model."""


class EMAModel:
    """Stands in for ``diffusers.training_utils.EMAModel``: the same methods, and averages of any length afterwards.

    Averages begin at the first ``step``, beside the parameters that it is given: what the object is made with is not
    kept. Where every rank has the whole model, each keeps whole averages and works alone, so that the first rank may
    save or validate by itself, as the scripts do; it writes the run folder. Sharded parameters are averaged in shards,
    and every rank must call everything.

    Args:
        parameters: Of the model, in its own order.
        decay: What the script asks for: tracked as ``exponential:decay=...,ramp=0.077``, which is diffusers' average
            but for the first dozens of steps, and but for ``use_ema_warmup``, whose ramp has no closed form. None to
            do without.
        min_decay: Kept in the state and not used, like ``use_ema_warmup``, ``inv_gamma``, ``power`` and ``foreach``.
        update_after_step: Steps before averaging begins.
        model_cls: Class of the model, of diffusers, from which names of parameters come.
        model_config: Its configuration.
        model: The model itself, which must be given where it is sharded.
        run_dir: Run folder, as of ``PostHocEMA``, like the next two. Averages of another model need another one.
        sigma_rels: Relative widths to track besides.
        snapshot_every: Steps between snapshots.
        target: The average that is copied and saved, one of those that are tracked: unless given that of ``decay``,
            or the first width without one.
        options: More arguments of ``PostHocEMA``.
        kwargs: Old names that diffusers still takes: ``max_value``, ``min_value``, ``device``.

    Raises:
        TargetError: An average cannot be tracked, the target is not, or an argument is not known.
    """

    def __init__(
        self,
        parameters: Parameters,
        decay: float | None = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        foreach: bool = False,
        model_cls: Any = None,
        model_config: Any = None,
        *,
        model: nn.Module | None = None,
        run_dir: str | Path = "ema",
        sigma_rels: Sequence[float] | None = None,
        snapshot_every: float = 1000,
        target: str | float | None = None,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if unknown := set(kwargs) - {"max_value", "min_value", "device"}:
            raise TargetError(f"EMAModel: unknown arguments {sorted(unknown)}", hint="options={...} for PostHocEMA's")
        self.decay = decay if kwargs.get("max_value") is None else kwargs["max_value"]
        self.min_decay, self.update_after_step = min_decay, update_after_step
        self.use_ema_warmup, self.inv_gamma, self.power, self.foreach = use_ema_warmup, inv_gamma, power, foreach
        self.model_cls, self.model_config = model_cls, model_config
        self.optimization_step = 0
        self.cur_decay_value: float | None = None
        self._model, self._run_dir, self._options = model, run_dir, dict(options or {})
        self._widths = (0.05, 0.10) if sigma_rels is None else tuple(sigma_rels)
        self._snapshot_every, self._wanted = snapshot_every, target
        self._ema: PostHocEMA | None = None
        self._names, self._module = list[str](), nn.Module()
        self._apart: Callable[[], AbstractContextManager[None]] = nullcontext
        self._stored: list[Tensor] | None = None
        self._pending: Any = None
        _ = self._choice.index  # refuses what is not tracked

    @property
    def _choice(self) -> Choice:
        return Choice(self.decay, self._widths, self._wanted, self.update_after_step)

    def get_decay(self, optimization_step: int) -> float:
        """Weight that the average which is copied keeps of itself at a step."""
        return self._choice.decay_at(optimization_step)

    def step(self, parameters: Parameters) -> None:
        """Take the weights into every average: after each optimizer step, on every rank.

        Raises:
            PhemaError: As of ``PostHocEMA`` and its ``update``.
        """
        given = self._listed(parameters)
        self.cur_decay_value = self.get_decay(self.optimization_step + 1)
        if self._ema is None:
            # What goes wrong then goes wrong on the first rank, and the others must not wait for it.
            agree(lambda: self._begin(given))
            agree(self._update)
        else:
            self._update()

    def _update(self) -> None:
        self.optimization_step += 1
        with self._apart():
            self._bound().update(self.optimization_step)

    def _begin(self, given: list[nn.Parameter]) -> None:
        sharded = any(isinstance(param, DTensor) for param in given)
        if sharded and self._model is None:
            raise UnsupportedModel(
                "step: the parameters are sharded, and which modules gather them is not known",
                hint="give the model, too: EMAModel(unet.parameters(), ..., model=unet)",
            )
        named = self._model
        if named is None and self.model_cls and self.model_config:
            named = empty_model(self.model_cls, self.model_config)
        self._names = names_of(named, given)
        self._module = skeleton(self._names, given) if self._model is None else self._model
        if not sharded:
            self._apart = alone
        first = sharded or rank_and_size()[0] == 0
        with self._apart():
            self._ema = PostHocEMA(
                self._module,
                # Elsewhere nothing is stored: the first rank has all that the others have.
                self._run_dir if first else tempfile.mkdtemp(prefix="sharded-phema-"),
                self._widths,
                self._snapshot_every if first else 1e300,
                profiles=self._choice.profiles,
                start=self._choice.start,
                **self._options,
            )
        self._restore_pending()

    def _bound(self) -> PostHocEMA:
        if self._ema is None:
            raise OrderError("EMAModel: nothing was averaged yet", hint="call step(parameters) first")
        return self._ema

    def _listed(self, parameters: Parameters) -> list[nn.Parameter]:
        """Parameters, looked up once nothing is gathered any more."""
        self._publish()
        return list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)

    def _publish(self) -> None:
        if self._model is not None:
            backend_of(self._model).publish(self._model, None)

    @property
    def _begun(self) -> bool:
        return self._ema is not None and self.optimization_step > self.update_after_step

    def _averages(self) -> Any:
        return self._bound().state_dict()[self._choice.label]

    @property
    def shadow_params(self) -> list[Tensor]:
        """This rank's part of the average which is copied, in the order of the parameters that are trained."""
        return list(self._averages().values()) if self._begun else []

    def copy_to(self, parameters: Parameters) -> None:
        """Write the average into parameters, in the order in which ``step`` was given them; nothing before it began."""
        given = self._listed(parameters)
        if self._begun:
            write_averages(zip(self._names, given, strict=True), self._averages())
        elif self._ema is None and isinstance(self._pending, str):  # as it was saved
            saved = dict(self.model_cls.from_pretrained(Path(self._pending).parent).named_parameters())
            write_averages(zip(saved, given, strict=True), saved)
        self._publish()

    def store(self, parameters: Parameters) -> None:
        """Keep the weights as they are, on the CPU, for ``restore``."""
        self._stored = [local_part(param).to("cpu", copy=True) for param in self._listed(parameters)]

    def restore(self, parameters: Parameters) -> None:
        """Put back what was stored.

        Raises:
            OrderError: Nothing is.
        """
        if self._stored is None:
            raise OrderError("restore: no weights were stored", hint="call store(parameters) before copy_to")
        with torch.no_grad():
            for param, kept in zip(self._listed(parameters), self._stored, strict=True):
                local_part(param).copy_(kept)
        self._stored = None
        self._publish()

    def to(self, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> None:
        """Nothing: averages are float32, and where the parameters are or, after ``pin_memory``, in host memory."""

    def pin_memory(self) -> None:
        """Keep averages in host memory, if no step was made yet."""
        self._options["offload"] = True

    def state_dict(self) -> dict[str, Any]:
        """Numbers, and under ``phema`` the averages, which alias the live ones, or the folder where they were saved."""
        state = {name: getattr(self, name) for name in NUMBERS}
        return state | {"phema": self._pending if self._ema is None else self._ema.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state, bit for bit: averages are read at the next ``step``.

        Raises:
            OrderError: It is the state of diffusers' own EMAModel, or averages were stored already.
        """
        if "phema" not in state_dict:
            raise OrderError(
                "load_state_dict: this is not the state of averages that can be continued",
                hint="a run that began with diffusers' own EMAModel goes on with that; begin a new run with this one",
            )
        for name in NUMBERS:
            setattr(self, name, state_dict.get(name, getattr(self, name)))
        self._pending = state_dict["phema"]
        if self._ema is not None:
            self._restore_pending()

    def _restore_pending(self) -> None:
        state, self._pending = self._pending, None
        with self._apart():
            if isinstance(state, str):
                load_checkpoint(self._bound(), state)
            elif state is not None:
                self._bound().load_state_dict(state)

    def save_pretrained(self, path: str | Path) -> None:
        """Save a model with the average's weights, as ``model_cls.from_pretrained`` opens it, and how to go on.

        Where the model is whole on every rank, the first one saves, whether or not the others call this.

        Raises:
            OrderError: Nothing was averaged, or what the model is was not said.
        """
        if self.model_cls is None or self.model_config is None:
            raise OrderError("of what model is not known", hint="make EMAModel with model_cls and model_config")
        ema = self._bound()
        if self._apart is alone and rank_and_size()[0] > 0:
            return
        with self._apart():
            save_checkpoint(ema, f"{path}/phema")
            # Before averaging begins there is no average, and the weights stand for it, as they do for diffusers.
            early = self._apart is alone and not self._begun
            weights = dict(self._module.named_parameters()) if early else self._rebuilt(Path(path, "rebuilt"))
            numbers = {name: getattr(self, name) for name in NUMBERS}
            from_first(lambda: save_model(self.model_cls.from_config(self.model_config), weights, numbers, Path(path)))

    def _rebuilt(self, out: Path) -> dict[str, Tensor]:
        """The whole average, in shards of the ranks until it is on disk. Collective."""
        self._bound().snapshot()
        label = self._choice.label
        reconstruct(self._run_dir, [label], out=out, max_shard_size="none", force=True)
        return load_file(out / parse_target(label).slug / "model.safetensors")

    @classmethod
    def from_pretrained(cls, path: str | Path, model_cls: Any, foreach: bool = False, **options: Any) -> EMAModel:
        """What ``save_pretrained`` saved, for ``state_dict`` or ``copy_to``, or to go on with, given more ``options``.

        The folder must stay until the next ``step``.

        Raises:
            OrderError: It was saved by diffusers' own EMAModel.
        """
        config = dict(model_cls.load_config(path))
        numbers = {name: config.pop(name) for name in NUMBERS if name in config}
        ema = cls(
            (), foreach=foreach, model_cls=model_cls, model_config=config, **{"decay": numbers.get("decay"), **options}
        )
        found = {"phema": str(Path(path, "phema"))} if Path(path, "phema").is_dir() else {}
        ema.load_state_dict(numbers | found)
        return ema

    def close(self) -> None:
        """Store what the last snapshot does not hold yet, and end: worth a line at the end of a script."""
        if self._ema is not None:
            with self._apart():
                self._ema.close()
