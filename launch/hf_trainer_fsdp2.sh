#!/usr/bin/env bash
# The Trainer of Hugging Face with FSDP2, started by accelerate on one node. Without a GPU accelerate takes it for
# DistributedDataParallel, unasked.
#   RANKS=8 launch/hf_trainer_fsdp2.sh --out runs/hf
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec accelerate launch --config_file launch/configs/hf_fsdp2.yaml \
  --num_processes "${RANKS:?say how many, one for each GPU}" examples/train_hf_trainer.py "$@"
