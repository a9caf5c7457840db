# shellcheck shell=bash
# What the scripts in this folder share. They set `root`, the folder of the repository, before they source this.

# shellcheck source=launch/python.sh
source "$root/launch/python.sh"

say() {
    echo "$(date +%T) launch/slurm: $*" >&2
}

# For mistakes of the user: with this code a job is not queued again.
refuse() {
    say "$*"
    exit 2
}

most_starts=3
job=${SLURM_JOB_ID:-}
[[ -n $job ]] || refuse "SLURM_JOB_ID is not set, but this script runs in a job of Slurm: see docs/clusters.md"

# Sets run_directory, and MASTER_ADDR and MASTER_PORT, at which the machines meet.
describe() {
    local lines
    check_python
    lines=$("${python[@]}" "$root/launch/slurm/describe.py" "$@") || return
    { read -r run_directory && read -r MASTER_ADDR && read -r MASTER_PORT; } <<<"$lines"
}

# Runs all ranks: a task of srun for each, or (LAUNCH=torchrun) for each machine, where torchrun starts them.
run_ranks() {
    # When one ends, the others have time to end with a code of their own, before they are killed.
    local options=(--kill-on-bad-exit=0 --wait=30) tasks=${SLURM_NTASKS_PER_NODE:-1} cores=${SLURM_CPUS_PER_TASK:-1}
    case ${LAUNCH:-srun} in
    srun)
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cores}
        # Slurm does not hand the job's setting on to its steps.
        exec srun "${options[@]}" --cpus-per-task="$cores" "${python[@]}" -m partialfc.cli train "$@"
        ;;
    torchrun)
        # Otherwise it starts one for each GPU of the machine.
        if [[ $tasks -gt 1 || -z ${SLURM_GPUS_ON_NODE:-} ]]; then
            export NPROC_PER_NODE=${NPROC_PER_NODE:-$tasks}
        fi
        export NNODES=${SLURM_JOB_NUM_NODES} RDZV_ID=$job-${SLURM_RESTART_COUNT:-0} MASTER_ADDR MASTER_PORT
        # Which machine a task is on, only the task knows.
        # shellcheck disable=SC2016
        exec srun "${options[@]}" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
            --cpus-per-task=$((tasks * cores)) \
            bash -c 'NODE_RANK=$SLURM_NODEID exec "$0" "$@"' "$root/launch/torchrun.sh" "$@"
        ;;
    *)
        refuse "LAUNCH is '$LAUNCH', but must be srun or torchrun"
        ;;
    esac
}

# The step of the newest checkpoint that is whole, by its name; 0 without one.
newest_step() {
    local name step=0
    for name in "$run_directory"/checkpoints/step-*; do
        [[ $name =~ /step-([0-9]+)$ ]] && step=$((10#${BASH_REMATCH[1]}))
    done
    echo "$step"
}

# Whether another start makes sense: it does not after $most_starts in a row that have left no newer checkpoint.
worth_another_start() {
    local record=$run_directory/slurm-$job.starts step newest=0 starts=0
    step=$(newest_step)
    if [[ -f $record ]]; then
        read -r newest starts <"$record"
    fi
    starts=$((step > newest ? 0 : starts + 1))
    mkdir -p "$run_directory"
    echo "$step $starts" >"$record"
    if ((starts >= most_starts)); then
        say "giving up: $starts starts in a row have not come beyond the checkpoint of step $step"
        return 1
    fi
}

# A whole job: runs the ranks; if they end before the run is finished, puts the job into the queue again.
run_job() {
    local told="" ranks="" code=0
    # The time limit is near. Ranks save and leave; srun and torchrun hand the signal on to them.
    trap 'told=USR2; [[ -z $ranks ]] || kill -USR2 "$ranks" 2>/dev/null || true' USR2
    # Slurm takes the job away, and has told the ranks itself. What it does not queue again was cancelled, and stays so.
    trap 'told=TERM' TERM
    describe "$@" || exit
    if [[ -z $told ]]; then
        say "job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), ${SLURM_JOB_NODELIST:-}, run directory $run_directory"
        run_ranks "$@" &
        ranks=$!
        # A signal ends the first wait, and not the ranks.
        while kill -0 "$ranks" 2>/dev/null; do
            wait "$ranks" || true
        done
        wait "$ranks" || code=$?
    fi
    # Apart from these, srun's code says little: the highest of all tasks, or that of a signal.
    if [[ $ranks && $code == 0 ]]; then
        say "finished"
        rm -f "$run_directory/slurm-$job.starts"
        exit 0
    elif [[ $code == 2 ]]; then
        say "not queued again: the same start would end the same way"
        exit 2
    elif [[ $told != TERM ]] && ! worth_another_start; then
        exit 75
    elif [[ $told == TERM ]]; then
        say "told to end; Slurm decides whether this job goes on"
    else
        say "ended with code $code${told:+, told to stop by $told}, newest checkpoint at step $(newest_step); queued again"
        scontrol requeue "$job"
    fi
    exit 85
}
