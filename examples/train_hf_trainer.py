"""Trains a small GPT on Python's standard library with the Trainer of Hugging Face, and keeps averages of its weights.

Any launcher will do; the Trainer is told by it how to shard:

    python examples/train_hf_trainer.py --out runs/hf
    torchrun --standalone --nproc-per-node 2 examples/train_hf_trainer.py --out runs/hf
    deepspeed --num_gpus 2 examples/train_hf_trainer.py --out runs/hf --deepspeed launch/configs/hf_zero3.json
    accelerate launch --config_file launch/configs/hf_fsdp2.yaml examples/train_hf_trainer.py --out runs/hf
"""

import argparse
from pathlib import Path

import torch
from sharded_phema.integrations.transformers import PostHocEMACallback
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from text import VOCABULARY, TextDataset

WIDTHS = ("0.05", "0.10", "0.15")


def parse_options() -> argparse.Namespace:
    """Options from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/hf"), help="folder of the run (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="blocks of the network (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128, help="width, a multiple of 32 (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="bytes in a sequence (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step on each rank (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="constant rate (default: %(default)s)")
    parser.add_argument("--deepspeed", type=str, help="configuration of DeepSpeed, of launch/configs")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of --out")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the launcher of DeepSpeed
    return parser.parse_args()


def training_arguments(given: argparse.Namespace) -> TrainingArguments:
    """What the Trainer is to do: evaluate ten times, save twice."""
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(given.out),
        max_steps=given.steps,
        per_device_train_batch_size=given.batch,
        per_device_eval_batch_size=given.batch,
        learning_rate=given.learning_rate,
        lr_scheduler_type="constant_with_warmup",  # the averages take the place of a decay
        warmup_steps=given.steps // 20,
        eval_strategy="steps",
        eval_steps=max(1, given.steps // 10),
        save_steps=max(1, given.steps // 2),
        logging_steps=max(1, given.steps // 10),
        deepspeed=given.deepspeed,
        bf16=cuda,
        use_cpu=not cuda,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
    )


def make_model(given: argparse.Namespace) -> GPT2LMHeadModel:
    """A network with weights of chance."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=given.length,
        n_embd=given.width,
        n_layer=given.layers,
        n_head=given.width // 32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def last_losses(history: list[dict[str, float]]) -> dict[str, float]:
    """Losses of the last evaluation, of the weights and of each average."""
    keys = {"weights": "eval_loss"} | {f"average {width}": f"eval_ema_{width}_loss" for width in WIDTHS}
    return {name: next(logs[key] for logs in reversed(history) if key in logs) for name, key in keys.items()}


def main() -> None:
    """Trains, and prints what the averages are worth."""
    given = parse_options()
    arguments = training_arguments(given)
    torch.manual_seed(0)  # all ranks begin with the same weights
    trainer = Trainer(
        model=make_model(given),
        args=arguments,
        train_dataset=TextDataset("train", given.length),
        eval_dataset=TextDataset("eval", given.length, limit=256),
    )
    averages = PostHocEMACallback(
        sigma_rels=(0.05, 0.10), snapshot_every=max(1, given.steps // 20), evaluate_with=WIDTHS, export=WIDTHS
    )
    averages.attach(trainer)
    trainer.add_callback(averages)
    trainer.train(resume_from_checkpoint=given.resume)
    if trainer.is_world_process_zero():
        print(f"\nvalidation loss after {given.steps} steps, nats per byte")
        for name, loss in last_losses(trainer.state.log_history).items():
            print(f"  {name:<14} {loss:.4f}")
        print(f"averages for from_pretrained: {given.out / 'ema_exports'}")


if __name__ == "__main__":
    main()
