#!/usr/bin/env bash
# Pretraining on one or many machines under torchrun: a process that dies or hangs (exit code 75) ends all of them, and
# all begin again from the last saved state. Call it on each machine with the same arguments:
#
#   NODES=2 HEAD=node-0:29400 deploy/pretrain-torchrun.sh my.yaml --out /shared/runs/mine
#
# PROCESSES: processes a machine (default: one for each GPU).  RESTARTS: how often all begin again.
# To stop: send SIGTERM to torchrun; every process finishes its step and saves (torchrun gives it 30 seconds).
set -euo pipefail
PYTHON=${PYTHON:-python3}
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
exec "$PYTHON" -m torch.distributed.run \
  --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES:-$((GPUS > 0 ? GPUS : 1))}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" --rdzv-id "${JOB:-puyu}" \
  --max-restarts "${RESTARTS:-20}" --monitor-interval 1 \
  -m puyu pretrain "$@"
