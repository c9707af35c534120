#!/usr/bin/env bash
# accelerate on the GPUs of one node, the whole model on each:
#   RANKS=8 launch/accelerate_ddp.sh --out runs/ddp
# More for the launcher itself, such as --num_machines, in LAUNCH_FLAGS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

read -ra flags <<< "${LAUNCH_FLAGS:-}"
exec accelerate launch --config_file launch/configs/accelerate_ddp.yaml \
  --num_processes "${RANKS:?say how many, one for each GPU}" "${flags[@]}" examples/train_accelerate.py "$@"
