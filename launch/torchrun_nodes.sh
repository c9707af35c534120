#!/usr/bin/env bash
# Several nodes that see the same folders: run this on each of them, with its own NODE_RANK.
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node-0 launch/torchrun_nodes.sh --out /shared/runs/decay
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

exec torchrun --nnodes "${NODES:?}" --node-rank "${NODE_RANK:-${SLURM_NODEID:?say NODE_RANK}}" --nproc-per-node "${RANKS:-gpu}" \
  --master-addr "${MASTER_ADDR:?}" --master-port "${MASTER_PORT:-29500}" \
  examples/posthoc_decay.py "$@"
