# shellcheck shell=bash disable=SC2034
# Sets `python`, the words that run Python for a training. Sourced by the scripts in this folder.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -n ${PARTIALFC_PYTHON:-} ]]; then
    read -ra python <<<"$PARTIALFC_PYTHON"
elif [[ -x $root/.venv/bin/python ]]; then
    python=("$root/.venv/bin/python")
else
    python=(python)
fi
