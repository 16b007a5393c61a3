#!/bin/bash
# All that only a GPU can show, in one command of under 7 minutes (16 cores, one GPU):
#
#     benchmarks/on_gpu.sh [--list] [FOLDER]
#
# Runs the device's tests, tunes, and times kernels, layers of R1 and of a dense model, links, sums of ranks and the
# engine.
# Results, logs and tuned tables go to FOLDER ($OUT, or benchmarks/results/gpu): at most 8 files, of which summary.md
# says how each step ended. A step that fails, or runs past its time limit (exit status 124), keeps no other from
# running. --list names the steps, their limits and commands, and runs none.
#
# Exit status: 0 if every step ended with 0, else 1; 2 for wrong arguments. Without a GPU the test steps run what
# they can in Triton's interpreter, links and engine run on the CPU, and kernels and layers fail with a sentence.
#
# Needs torch, triton, pytest and what the package needs without Ray; pytest-xdist and hypothesis where they are
# there. PYTHON names the interpreter, LIMIT a limit in seconds for every step in place of its own.

set -u
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
TOTAL=415
LIST=
[ "${1:-}" = --list ] && { LIST=1; shift; }
[ $# -le 1 ] && [[ "${1:-}" != -* ]] || { sed -n '2,/^$/s/^# \?//p' "$0" >&2; exit 2; }
FOLDER=${1:-${OUT:-benchmarks/results/gpu}}
LOGS=$FOLDER/logs

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

# Not all plugins are everywhere: what configures one that is missing is no error.
TESTS=(-m pytest -q -m "" -p no:cacheprovider -W ignore::pytest.PytestConfigWarning)
COMM=(tests/comm/test_process_group.py tests/comm/test_device_dispatch.py)
if [ -z "$LIST" ]; then
    has hypothesis && COMM=(tests/comm)
    has xdist && PARALLEL=1
fi
workers() { [ -n "${PARALLEL:-}" ] && echo "-n $1"; }

# step NAME SECONDS ARGUMENTS…: runs the interpreter with them; its output goes to a log and to the terminal.
step() {
    local name=$1 limit=${LIMIT:-$2} started=$SECONDS code
    shift 2
    if [ -n "$LIST" ]; then
        echo "$name ($limit s): $PYTHON $(printf '%q ' "$@")"
        return
    fi
    [ $((TOTAL - SECONDS)) -lt "$limit" ] && limit=$((TOTAL - SECONDS))
    if [ "$limit" -le 0 ]; then
        code=124
        echo "not begun: the $TOTAL s of all steps were over" >"$LOGS/$name.log"
    else
        # Interrupted, not terminated: pytest then says what it has found so far. bash lets what runs beside it
        # ignore interrupts, which is undone here.
        timeout -s INT -k 5 "$limit" env --default-signal=INT "$PYTHON" "$@" >"$LOGS/$name.log" 2>&1
        code=$?
    fi
    echo "| $name | $code | $((SECONDS - started)) | $limit |" >"$LOGS/$name.row"
    echo "== $name: exit status $code after $((SECONDS - started)) s"
    tail -n 15 "$LOGS/$name.log"
}

# tabled NAME SECONDS ARGUMENTS…: a step whose output is itself a result.
tabled() {
    step "$@"
    [ -n "$LIST" ] || cp "$LOGS/$1.log" "$FOLDER/$1.md"
}

[ -n "$LIST" ] || { mkdir -p "$LOGS" && rm -f "$LOGS"/* || exit 2; }
step device 20 -c "import sys, torch, triton; print('Python', sys.version.split()[0], 'torch', torch.__version__, \
'Triton', triton.__version__); print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')"
# Tests share the GPU and the cores; what is timed has both for itself.
beside() { if [ -n "$LIST" ]; then step "$@"; else step "$@" & fi; }
beside tests-triton 115 "${TESTS[@]}" $(workers 6) tests/triton
beside tests-comm 115 "${TESTS[@]}" $(workers 3) "${COMM[@]}"
beside tests-gpu 115 "${TESTS[@]}" $(workers 4) tests/gpu
wait
tabled kernels 65 -m benchmarks.kernels --seconds 45 --write-tuned "$FOLDER/tuned"
tabled layers 75 -m benchmarks.layers --profile --write-tuned "$FOLDER/tuned"
tabled links 20 benchmarks/links.py --rounds 500
step ranks 20 -m benchmarks.ranks
[ -n "$LIST" ] || cat "$LOGS/ranks.log" >>"$FOLDER/links.md"
tabled engine 70 -m benchmarks.engine
tabled dense 40 -m benchmarks.layers --model DeepSeek-R1-Distill-Llama-8B --batches 1 8 64
[ -n "$LIST" ] && exit 0

{
    echo "# benchmarks/on_gpu.sh"
    cat "$LOGS/device.log"
    echo
    echo "| step | exit status | seconds | limit |"
    echo "| --- | ---: | ---: | ---: |"
    cat $(ls -tr "$LOGS"/*.row)
    echo
    echo "$SECONDS s in all. Logs: logs.tar.gz; tables for kernels/tuned: tuned.tar.gz, empty where none was written."
} >"$FOLDER/summary.md"
failed=$(cut -d'|' -f3 "$LOGS"/*.row | grep -vc '^ 0 $')
rm -f "$LOGS"/*.row
mkdir -p "$FOLDER/tuned"
for part in logs tuned; do
    tar -czf "$FOLDER/$part.tar.gz" -C "$FOLDER" "$part" && rm -r "${FOLDER:?}/$part"
done
cat "$FOLDER/summary.md"
[ "$failed" -eq 0 ]
