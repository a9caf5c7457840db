# shellcheck shell=bash disable=SC2034
# Sets `python`, the words that run Python for a training. Sourced by the scripts in this folder, each of which has a
# function `refuse` that says why it does not start, under the name of that script.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -n ${PARTIALFC_PYTHON:-} ]]; then
    read -ra python <<<"$PARTIALFC_PYTHON"
elif [[ -x $root/.venv/bin/python ]]; then
    python=("$root/.venv/bin/python")
else
    python=(python)
fi

# Refuses words that do not run Python: found out later, they end with any code, and often without a line.
check_python() {
    local what="PARTIALFC_PYTHON is '${PARTIALFC_PYTHON:-}'" said code=0
    local wanted="set it to what runs Python, such as 'apptainer exec --nv image.sif python', or unset it"
    if [[ -z ${PARTIALFC_PYTHON:-} ]]; then
        what="PARTIALFC_PYTHON is not set, which means '${python[*]}'"
        wanted="run 'make setup', or set it to what runs Python"
    fi
    [[ ${#python[@]} -gt 0 ]] || refuse "$what, which has no word in it; $wanted"
    type -P "${python[0]}" >/dev/null || refuse "$what, but '${python[0]}' is no program that can be started; $wanted"
    # An answer that only Python gives: 'true' and 'echo' end with 0 as well.
    said=$("${python[@]}" -c 'print(6 * 7)' 2>&1 </dev/null) || code=$?
    # SIGTERM, which Slurm sends to all processes of a job, says nothing about Python.
    if [[ $code != 143 && ($code != 0 || $'\n'$said$'\n' != *$'\n42\n'*) ]]; then
        (refuse "$what, but this does not run Python: '${python[*]} -c \"print(6 * 7)\"' ended with code $code" \
            "and said '$said'; $wanted") || true
        # Above are those of signals, and of containers that do not start, which may do so at another time.
        exit $((code < 128 ? 2 : 75))
    fi
}
