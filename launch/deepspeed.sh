#!/usr/bin/env bash
# DeepSpeed on the GPUs of one node, with a config of launch/configs:
#   launch/deepspeed.sh zero3 --out runs/zero3
# More for the launcher itself, such as --hostfile, in LAUNCH_FLAGS.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

config=${1:?say zero1, zero2, zero3 or zero3_offload}
shift
read -ra flags <<< "${LAUNCH_FLAGS:-}"
exec deepspeed "${flags[@]}" examples/train_deepspeed.py --config "launch/configs/$config.json" "$@"
