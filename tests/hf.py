"""Tiny models in the Trainer of Hugging Face, in every mode that runs on the CPU, and what their weights really are."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

VOCABULARY = 33  # does not divide by two
LENGTH = 8


def make_model(*, tied: bool = True, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The same weights at every call."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=19,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def make_data(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Sequences of chance."""
    chance = torch.Generator().manual_seed(seed)
    rows = torch.randint(VOCABULARY, (count, LENGTH), generator=chance)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def loss_of(model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    """Mean loss of a model, one sequence after the other."""
    with torch.no_grad():
        losses = [model(**{key: x[None] for key, x in row.items()}).loss.item() for row in data]
    return sum(losses) / len(losses)


@dataclass(frozen=True)
class Mode:
    """How a Trainer shards.

    Attributes:
        check: Proves of a Trainer that has begun that it does.
        weights: Whole float32 masters of all that trains, by name; collective.
        arguments: More of TrainingArguments.
        dtype: Of the model.
    """

    check: Callable[[Any], object]
    weights: Callable[[Any], dict[str, Tensor]]
    arguments: Callable[[], dict[str, Any]] = dict
    dtype: torch.dtype = torch.float32


def _plain(trainer: Any) -> None:
    assert trainer.model_wrapped is trainer.model and type(trainer.model) is LlamaForCausalLM


def _ddp(trainer: Any) -> None:
    assert isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel)
    assert dist.get_world_size() > 1


def _fsdp2(trainer: Any) -> None:
    assert all(isinstance(param, DTensor) for param in trainer.model.parameters())


def _fsdp1(trainer: Any) -> None:
    units = [module for module in trainer.model.modules() if isinstance(module, FullyShardedDataParallel)]
    assert trainer.model is units[0] and len(units) == 3  # the whole, and each layer


def _zero(stage: int) -> Callable[[Any], None]:
    def check(trainer: Any) -> None:
        assert trainer.model_wrapped.zero_optimization_stage() == stage
        assert str(stage) in type(trainer.optimizer.optimizer).__name__ or stage == 2
        sharded = [hasattr(param, "ds_id") for param in trainer.model.parameters()]
        assert sharded == [stage == 3] * len(sharded)

    return check


def own(trainer: Any) -> dict[str, Tensor]:
    """Parameters as they are."""
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters()}


def _from_dtensors(trainer: Any) -> dict[str, Tensor]:
    found = {name: param.full_tensor() for name, param in trainer.model.named_parameters()}
    return {name: param.detach().clone() for name, param in found.items()}


def _summoned(trainer: Any) -> dict[str, Tensor]:
    with FullyShardedDataParallel.summon_full_params(trainer.model, writeback=False):
        return {name.replace("_fsdp_wrapped_module.", ""): x for name, x in own(trainer).items()}


def _masters(trainer: Any) -> dict[str, Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(param).clone() for name, param in trainer.model.named_parameters()}


def _deepspeed(stage: int, dtype: torch.dtype) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": dtype == torch.bfloat16},
    }
    return {"deepspeed": config, "bf16": dtype == torch.bfloat16}


def _fsdp(version: int) -> dict[str, Any]:
    # Saving tied weights of FSDP2 whole, transformers calls collectives on some ranks only. FSDP1 that brings the ranks
    # into step asks for a GPU.
    config = {"version": version, "state_dict_type": "SHARDED_STATE_DICT", "sync_module_states": False}
    return {"fsdp": True, "fsdp_config": config | {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def _zero_mode(stage: int, dtype: torch.dtype = torch.float32) -> Mode:
    return Mode(_zero(stage), _masters, lambda: _deepspeed(stage, dtype), dtype)


MODES = {
    "plain": Mode(_plain, own),
    "ddp": Mode(_ddp, own),
    "fsdp2": Mode(_fsdp2, _from_dtensors, lambda: _fsdp(2)),
    "fsdp1": Mode(_fsdp1, _summoned, lambda: _fsdp(1)),
    "zero2": _zero_mode(2),
    "zero3": _zero_mode(3),
    "zero2-bf16": _zero_mode(2, torch.bfloat16),
    "zero3-bf16": _zero_mode(3, torch.bfloat16),
}


class Recorder(TrainerCallback):
    """Whole weights after every optimizer step, as a test may gather them; and what the Trainer really is.

    Attributes:
        steps: Step and weights, of steps that were not skipped.
        saved: The same where the Trainer saved, which it does after it evaluates.
        trainer: Set once there is one.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.steps: list[tuple[int, dict[str, Tensor]]] = []
        self.saved: list[tuple[int, dict[str, Tensor]]] = []
        self.trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.mode.check(self.trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not given["optimizer"].step_was_skipped:
            self.steps.append((state.global_step, self.mode.weights(self.trainer)))

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        self.saved.append((state.global_step, self.mode.weights(self.trainer)))


def make_trainer(
    mode: Mode,
    out: Path,
    callbacks: list[Any],
    *,
    tied: bool = True,
    rows: int = 40,
    kind: type[Trainer] = Trainer,
    compute_metrics: Any = None,
    **given: Any,
) -> tuple[Any, Recorder]:
    """A Trainer in some mode, whose callbacks know it, and what records its weights."""
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "optim": "adamw_torch",
        "dataloader_pin_memory": False,
    }
    trainer = kind(
        model=make_model(tied=tied, dtype=mode.dtype),
        args=TrainingArguments(**arguments | mode.arguments() | given),
        train_dataset=make_data(rows),
        eval_dataset=make_data(4, seed=1),
        callbacks=[*callbacks],
        compute_metrics=compute_metrics,
    )
    recorder = Recorder(mode)
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    for callback in callbacks:
        if hasattr(callback, "attach"):
            callback.attach(trainer)
    return trainer, recorder


def end(trainer: Any) -> None:
    """Free what DeepSpeed holds, so that the ranks can make another."""
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.destroy()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word is a token."""
    words = ["<unk>", "<s>", "</s>", "<pad>", *["one", "two", "three", "four", "five", "six", "seven", "eight"]]
    inner = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@contextmanager
def accelerated() -> Iterator[None]:
    """What a launcher sets; and nothing is left of a Trainer afterwards, so that the same process can make another."""
    from accelerate.state import AcceleratorState, GradientState

    before = dict(os.environ)
    if dist.is_initialized():
        rank, size = str(dist.get_rank()), str(dist.get_world_size())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    try:
        with pytest.MonkeyPatch().context() as patch:
            _let_the_cpu_shard(patch)
            yield
    finally:
        gc.collect()
        AcceleratorState._reset_state()
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(before)


def _let_the_cpu_shard(patch: pytest.MonkeyPatch) -> None:
    """On several CPU processes accelerate takes FSDP for DDP, unasked. Tests check that the parameters are sharded."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **given: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **given)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            self.device = torch.device("cpu")  # for FSDP1, cpu:0 is another device

    patch.setattr(AcceleratorState, "__init__", init)


def by_hand(steps: list[tuple[float, dict[str, Tensor]]], gamma: float) -> dict[str, Tensor]:
    """The power-function average of recorded weights: the loop that everybody writes, in float32, with exact decays."""
    average: dict[str, Tensor] = {}
    last = 0.0
    for t, weights in steps:
        enters = 1 - (last / t) ** (gamma + 1) if average else 1.0
        for name, weight in weights.items():
            average[name] = average[name].lerp(weight, enters) if name in average else weight.clone()
        last = t
    return average
