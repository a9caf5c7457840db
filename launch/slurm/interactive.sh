#!/usr/bin/env bash
# A training inside of an allocation, to try something out. It ends with the command, and is not queued again.
#
#     salloc --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/slurm/interactive.sh CONFIG [key.sub=value ...]
#
# or, in the shell of a salloc, without that. The variables are those of train.sbatch.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
# shellcheck source=launch/slurm/common.sh
source "$root/launch/slurm/common.sh"

[[ $# -ge 1 ]] || refuse "usage: salloc [options of salloc] launch/slurm/interactive.sh CONFIG [key.sub=value ...]"
describe "$@"
run_ranks "$@"
