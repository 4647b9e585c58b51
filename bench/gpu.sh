#!/usr/bin/env bash
# Everything that needs a GPU, in stages: check kernels block train decode tune profile.
#
#   bench/gpu.sh STAGE [STAGE ...]         nine minutes at most in all: better one call for each stage
#   bench/gpu.sh --rehearse [STAGE ...]    the same commands on a CPU with tiny shapes; without a stage all of them
#
# OUT (runs/gpu) is the folder of results, with a log of each command, and PYTHON (python3) an interpreter with PyTorch
# and Triton. WHEELS is a folder of wheels, of which those that are not installed are used. PHI1_COMMIT is the commit of
# the sources where there is no .git. `phi1 bench report OUT` then writes bench/results/ and docs/benchmarks.md.
set -uo pipefail
shopt -s nullglob
fail() { echo "gpu.sh: error: $1" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd) python=${PYTHON:-python3} stages='check kernels block train decode tune profile'
device=cuda times=1 tiny=() quick=(--quick) all=(--seconds 1 --last quick.json) memcheck=() pytest=(-n 6)
kernels=("$root/tests/kernels" --ignore-glob='*test_interpreter.py')
suite=("$root"/tests/{phi1,train,bench} --ignore-glob='*test_gpu_rehearsal.py')
layer='parallel_block N=16384 T=2048 D=2048 F=8192 H=32 float16 forward+backward'
command -v compute-sanitizer > /dev/null && memcheck=(compute-sanitizer --tool memcheck --error-exitcode 9)
if [ "${1:-}" = --rehearse ]; then
    shift
    # shellcheck disable=SC2086
    [ $# -gt 0 ] || set -- $stages
    export CUDA_VISIBLE_DEVICES=''
    device=cpu times=5 tiny=(--rehearse) memcheck=() pytest=() quick=(--quick --seconds 0.01 --peers)
    all=(--case gelu --seconds 0.01 --last quick.json --peers)
    kernels=("$root/tests/kernels/pointwise" -k 'layer_norm and empty') suite=("$root/tests/phi1/test_config.py")
    layer='parallel_block N=256 T=128 D=256 F=1024 H=4 float32 forward+backward cpu'
fi
[ $# -gt 0 ] || fail "give a stage: $stages; or --rehearse"
for stage in "$@"; do
    [[ " $stages " == *" $stage "* ]] || fail "there is no stage '$stage'; there are $stages"
done
[ -d "${WHEELS:-/}" ] || fail "WHEELS=$WHEELS is no folder"
[[ $python != */* || $python == /* ]] || python=$PWD/$python
has() { "$python" -c "import $1" 2> /dev/null; }
"$python" -c 'import importlib.util as i, sys; sys.exit(None in map(i.find_spec, ("torch", "triton", "numpy")))' \
    2> /dev/null || fail "$python has no torch, triton and numpy; PYTHON names another interpreter"
[ $device = cpu ] || has 'torch; torch.cuda.current_device()' ||
    fail "$python finds no CUDA device; --rehearse runs on a CPU"
out=$(mkdir -p "${OUT:=$root/runs/gpu}" && cd "$OUT" && pwd) && exec 9> "$out/.lock" || exit 2
flock -n 9 || fail "another gpu.sh writes to $out: wait until it ends, or set another OUT"

scratch=$(mktemp -d) bad=''
stop() {  # with the command that runs and every process of its session
    for pid in $(jobs -p); do
        kill "$pid" && wait "$pid"
        pkill -KILL -s "$pid"
    done 2> /dev/null
    rm -rf "$scratch"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
# phi1 runs from the sources, and outside of the checkout, whose kernels/ transformers would import.
mkdir -p "$scratch/phi1" "$scratch/bin"
ln -s "$root"/phi1/* "$root"/{kernels,train,bench} "$scratch/phi1/"
printf '#!/bin/sh\nexec "%s" -c "import sys; from phi1.cli.main import main; sys.exit(main())" "$@"\n' "$python" \
    > "$scratch/bin/phi1" && chmod +x "$scratch/bin/phi1"
export PYTHONPATH="$scratch:$scratch/site${PYTHONPATH:+:$PYTHONPATH}" PATH="$scratch/bin:$PATH"
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
for wheel in ${WHEELS:+"$WHEELS"/*.whl}; do
    name=${wheel##*/} name=${name%%-*}
    has "importlib.metadata as m; m.version('$name')" || "$python" -m pip install --quiet --no-index \
        --find-links "$WHEELS" --no-deps --target "$scratch/site" "$name" >&2
done
has xdist || pytest=()
has pytest_instafail && pytest+=(--instafail)

run() {  # NAME SECONDS COMMAND ...: --minutes at its end gets the minutes left; exit code 3, a lost GPU, starts it again
    local name=$1 end=$((SECONDS + times * $2)) began=$SECONDS log=$out/$stage/$1.log code=124 left words
    shift 2
    mkdir -p "$out/$stage" && : > "$log"
    [ $end -lt $((times * 540)) ] || end=$((times * 540))
    while left=$((end - SECONDS)) words=("$@"); [ $left -ge 10 ]; do
        [ "${*: -1}" != --minutes ] || words+=("$(printf '%d.%02d' $((left * 4 / 300)) $((left * 4 % 300 / 3)))")
        (cd "$out/$stage" && exec setsid timeout -s INT -k 10 $left "${words[@]}") >> "$log" 2>&1 9>&- &
        wait $!
        code=$?
        pkill -KILL -s $!
        [ $code = 3 ] || break
    done
    echo "-- $stage $name: exit code $code, $((SECONDS - began)) s"
    tail -n 12 "$log" | cut -c -160
    # 3: what lost the GPU has a line in the results. 124: no time, as is usual for the long selection.
    [[ $code == [03] ]] || [ "$name $code" = 'all 124' ] || bad+=" $stage/$name"
}
bench() { run "$1" "$2" phi1 bench --device $device "${@:3}" --json "$1.json" --minutes; }
tests() { run "$1" "$2" "$python" -m pytest -v -rf --tb=short -p no:cacheprovider "${pytest[@]}" "${@:3}"; }
for stage in "$@"; do
    case $stage in
    check)
        [ $device = cuda ] || export TRITON_INTERPRET=1
        tests kernels 240 "${kernels[@]}"
        unset TRITON_INTERPRET
        # PyTorch's allocator cuts tensors out of large blocks, inside which memcheck sees no bounds.
        run sanitizer 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${memcheck[@]}" "$python" \
            "$root/bench/gpu/sanitize.py" "${tiny[@]}"
        tests suite 180 "${suite[@]}" ;;
    kernels)
        bench quick 260 --unit kernel "${quick[@]}"
        bench all 540 --unit kernel "${all[@]}" ;;
    block)
        bench quick 165 --unit block "${quick[@]}"
        # torch.compile keeps what it has tuned, so max-cudnn is quick behind max.
        bench max 185 --case "$layer" --peers torch torch+sdpa-cudnn liger+cudnn transformers-max
        bench max-cudnn 100 --case "$layer" --peers transformers-max+sdpa-cudnn
        bench model 165 --op micro-step "${quick[@]}"
        [ $device = cpu ] || bench all 540 --unit block "${all[@]}" ;;
    train) run sweep 540 "$python" "$root/bench/gpu/train_sweep.py" --out . "${tiny[@]}" --minutes ;;
    decode)
        bench quick 260 --op decode prefill "${quick[@]}"
        [ $device = cpu ] || bench all 540 --op decode prefill "${all[@]}" ;;
    tune)
        run list 60 phi1 tune --out tuned --dry-run
        [ $device = cpu ] || run search 540 phi1 tune --out tuned --compilers 6 --minutes ;;
    profile) run counters 540 "$python" "$root/bench/gpu/counters.py" --out . "${tiny[@]}" ;;
    esac
done
echo "results in $out"
[ -z "$bad" ] || { echo "gpu.sh: failed:$bad" >&2; exit 1; }
