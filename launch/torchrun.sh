#!/usr/bin/env bash
# Starts a training on this machine, or this machine's part of a training on several. docs/clusters.md explains it.
#
#     launch/torchrun.sh CONFIG [key.sub=value ...]
#
# NPROC_PER_NODE    processes on this machine; default: one for each GPU, or 2 without GPUs
# NNODES            machines: a number, or LEAST:MOST for as many as there are; default 1
# MASTER_ADDR       with several: host name or address of the machine at which all meet
# MASTER_PORT       with several: a free port of that machine; default 29500
# NODE_RANK         with several: 0 on that machine, other numbers on the others
# LOCAL_ADDR        with several: this machine as the others reach it; default: its host name
# MAX_RESTARTS      how often processes that failed are started again; default 3
# JOIN_SECONDS      with several: how long to wait for machines; default 600
# OMP_NUM_THREADS   threads of each process; default: cores / processes
# PARTIALFC_PYTHON  what runs Python, such as "apptainer exec --nv image.sif python"; default: .venv, else python
#
# It ends with 0 when the run is finished, 2 after a mistake of the user that another start would not mend, 75 after
# faults in spite of all restarts, and 85 when it was told to stop (SIGTERM, SIGINT, SIGQUIT, SIGUSR2, and SIGHUP but
# under nohup): start it again to go on.
set -euo pipefail

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then
    sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "$0" >&2
    exit 2
fi

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/python.sh
source "$launch/python.sh"

refuse() {
    echo "launch/torchrun.sh: $*" >&2
    exit 2
}

# NAME ALLOWED PATTERN: what is set must be like that.
check() {
    [[ -z ${!1:-} || ${!1} =~ ^($3)$ ]] || refuse "$1 is '${!1}', but must be $2"
}

check NNODES "a number, or LEAST:MOST such as 1:4" "[1-9][0-9]*(:[1-9][0-9]*)?"
[[ ${NNODES:-1} != *:* ]] || ((${NNODES%:*} <= ${NNODES#*:})) || refuse "NNODES is '$NNODES', but LEAST must not be above MOST"
check NPROC_PER_NODE "a number from 1 on" "[1-9][0-9]*"
check NODE_RANK "a number from 0 on" "[0-9]+"
# Machines are often counted 01, 02, ..., and to bash 08 is a mistake: it reads such numbers as octal.
NODE_RANK=${NODE_RANK:+$((10#$NODE_RANK))}
check MAX_RESTARTS "a number from 0 on" "[0-9]+"
check JOIN_SECONDS "a number from 1 on" "[1-9][0-9]*"
check MASTER_PORT "a number from 1 to 65535" "[1-9][0-9]{0,4}"
((${MASTER_PORT:-1} <= 65535)) || refuse "MASTER_PORT is '$MASTER_PORT', but must be a number from 1 to 65535"
check OMP_NUM_THREADS "a number from 1 on" "[1-9][0-9]*"
NNODES=${NNODES:-1}
if [[ $NNODES != 1 ]]; then
    [[ -n ${MASTER_ADDR:-} ]] ||
        refuse "NNODES is $NNODES, so set MASTER_ADDR to the host name or address of the machine where all meet"
    [[ -n $NODE_RANK ]] ||
        refuse "NNODES is $NNODES, so set NODE_RANK to 0 on the machine of MASTER_ADDR, to other numbers elsewhere"
fi
check_python

if [[ -z ${NPROC_PER_NODE:-} ]]; then
    gpus=$("${python[@]}" -c 'import torch; print(torch.cuda.device_count())')
    NPROC_PER_NODE=$((gpus > 0 ? gpus : 2))
fi
if [[ -z ${OMP_NUM_THREADS:-} ]]; then
    cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    OMP_NUM_THREADS=$((cores > NPROC_PER_NODE ? cores / NPROC_PER_NODE : 1))
fi
export OMP_NUM_THREADS
# Workers that torchrun starts again would otherwise look for each other at the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if [[ $NNODES == 1 ]]; then
    where=(--standalone)
else
    MASTER_PORT=${MASTER_PORT:-29500} JOIN_SECONDS=${JOIN_SECONDS:-600}
    # A machine that is gone is missed after 3 seconds, and the others go on 5 seconds after the last of them has come.
    # One that has lost the place where all meet gives up after 20 seconds.
    meeting=is_host=$((NODE_RANK == 0 ? 1 : 0)),join_timeout=$JOIN_SECONDS,last_call_timeout=5
    meeting+=,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=20
    where=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RDZV_ID:-partialfc}"
        --rdzv-conf "$meeting")
    if [[ -n ${LOCAL_ADDR:-} ]]; then
        where+=(--local-addr "$LOCAL_ADDR")
    fi
    if ((NODE_RANK > 0)); then
        # Machines need not start at the same time.
        # shellcheck disable=SC2016
        until timeout 5 bash -c ': <>"/dev/tcp/$0/$1"' "$MASTER_ADDR" "$MASTER_PORT" 2>/dev/null; do
            if ((SECONDS >= JOIN_SECONDS)); then
                echo "launch/torchrun.sh: nobody answers at $MASTER_ADDR:$MASTER_PORT after $JOIN_SECONDS seconds; start" \
                    "this script there with NODE_RANK=0, and look whether name, port and firewall let it through" >&2
                exit 75
            fi
            sleep 1
        done
    fi
fi

# Long enough to save what all processes hold; Slurm and the like end it earlier where they must.
exec "${python[@]}" "$launch/agent.py" --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" "${where[@]}" \
    --max-restarts "${MAX_RESTARTS:-3}" --shutdown-timeout 120 "$launch/rank.py" train "$@"
