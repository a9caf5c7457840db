#!/usr/bin/env bash
# Starts a training on this machine, or this machine's part of a training on several. launch/README.md explains it.
#
#     launch/torchrun.sh CONFIG [key.sub=value ...]
#
# NPROC_PER_NODE   processes on this machine; default: one for each GPU, or 2 without GPUs
# NNODES           machines; default 1. With more than one, set on each of them also
# NODE_RANK        this machine, 0 ... NNODES - 1
# MASTER_ADDR      host name or address of machine 0
# MASTER_PORT      a free port of machine 0; default 29500
# OMP_NUM_THREADS  threads of each process; default: cores / processes
set -euo pipefail

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0" >&2
    exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[[ -x $python ]] || python=python

if [[ -z ${NPROC_PER_NODE:-} ]]; then
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    NPROC_PER_NODE=$((gpus > 0 ? gpus : 2))
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    OMP_NUM_THREADS=$((cores > NPROC_PER_NODE ? cores / NPROC_PER_NODE : 1))
fi
export OMP_NUM_THREADS
# Workers that torchrun starts again would otherwise look for each other at the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

NNODES=${NNODES:-1}
if [[ $NNODES == 1 ]]; then
    where=(--standalone)
else
    : "${NODE_RANK:?NNODES is $NNODES, so set NODE_RANK to the number of this machine, from 0}"
    : "${MASTER_ADDR:?NNODES is $NNODES, so set MASTER_ADDR to the host name or address of machine 0}"
    where=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi

exec "$python" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" "${where[@]}" \
    -m partialfc.cli train "$@"
