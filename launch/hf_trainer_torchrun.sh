#!/usr/bin/env bash
# The Trainer of Hugging Face under torchrun: DistributedDataParallel on one node.
#   RANKS=8 launch/hf_trainer_torchrun.sh --out runs/hf
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec torchrun --standalone --nproc-per-node "${RANKS:-gpu}" examples/train_hf_trainer.py "$@"
