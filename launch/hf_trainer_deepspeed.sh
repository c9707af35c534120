#!/usr/bin/env bash
# The Trainer of Hugging Face with DeepSpeed ZeRO 2 or 3 on one node:
#   RANKS=8 launch/hf_trainer_deepspeed.sh hf_zero3 --out runs/hf
# Two at a time on one machine need a MASTER_PORT each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=${1:?say hf_zero2 or hf_zero3}
shift
exec deepspeed --num_gpus "${RANKS:?say how many, one for each GPU}" --master_port "${MASTER_PORT:-29500}" \
  examples/train_hf_trainer.py --deepspeed "launch/configs/$config.json" "$@"
