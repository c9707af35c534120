#!/usr/bin/env bash
# One node: as many ranks as there are GPUs, or RANKS of them. Arguments go to the example.
#   launch/torchrun.sh --out runs/decay
#   RANKS=2 launch/torchrun.sh --out runs/decay --steps 100
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec torchrun --standalone --nproc-per-node "${RANKS:-gpu}" examples/posthoc_decay.py "$@"
