#!/usr/bin/env bash
# All that wants a GPU, in stages of nine minutes at most, on a machine with nothing but PyTorch and Triton.
#
#   bench/gpu.sh STAGE [STAGE ...]         check kernels block train decode tune profile
#   bench/gpu.sh --rehearse [STAGE ...]    the same scripts on a CPU, with tiny shapes; without a stage all of them
#
# OUT     folder for results (default runs/gpu); what is done is in it as soon as it is done
# WHEELS  folder of wheels: packages that are missing are taken from it, and benchmarked peers that lie in it
# PYTHON  the interpreter that has PyTorch (default python3)
#
# The package runs from the source tree: links in a temporary folder map kernels/, train/ and bench/ into phi1.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/runs/gpu}
stages=(check kernels block train decode tune profile)
peers=(liger-kernel quack-kernels flash-attn flash-attn-4 cut-cross-entropy)

fail() { echo "gpu.sh: error: $1" >&2; exit 2; }

rehearse=()
if [ "${1:-}" = --rehearse ]; then
    rehearse=(--rehearse)
    shift
    [ $# -gt 0 ] || set -- "${stages[@]}"
fi
[ $# -gt 0 ] || fail "give a stage: ${stages[*]}; or --rehearse"
for stage in "$@"; do
    [[ " ${stages[*]} " == *" $stage "* ]] || fail "there is no stage '$stage'; there are ${stages[*]}"
done
"$python" -c 'import torch, triton' 2>/dev/null || fail "$python has no torch and triton; PYTHON names another"

overlay=$(mktemp -d)
trap 'rm -rf "$overlay"' EXIT
mkdir -p "$overlay/phi1" "$overlay/bin" "$overlay/site" "$out"
out=$(cd "$out" && pwd)
for path in "$root"/phi1/*; do ln -s "$path" "$overlay/phi1/"; done
for room in kernels train bench; do ln -s "$root/$room" "$overlay/phi1/$room"; done
cat > "$overlay/bin/phi1" <<END
#!/usr/bin/env bash
exec "$python" -c 'import sys; from phi1.cli import main; sys.exit(main())' "\$@"
END
chmod +x "$overlay/bin/phi1"
export PYTHONPATH="$overlay:$overlay/site${PYTHONPATH:+:$PYTHONPATH}" PATH="$overlay/bin:$PATH"
# The first command compiles what it imports, PyTorch too, and the others find it there.
export PYTHONPYCACHEPREFIX="$overlay/cache" PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ ${#rehearse[@]} -gt 0 ]; then export CUDA_VISIBLE_DEVICES=; fi

install() {  # a package from the folder of wheels, without what it depends on
    [ -n "${WHEELS:-}" ] && "$python" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" \
        --target "$overlay/site" --upgrade "$1" 2>>"$out/wheels.log"
}
cd "$out"  # not the checkout: Hugging Face's libraries would take its kernels/ for a package of theirs
while missing=$("$python" "$root/bench/gpu_stages.py" --needs "$@") && [ -n "$missing" ]; do
    for name in $missing; do
        install "$name" || fail "stage $* needs Python packages that are missing: ${missing//$'\n'/, }; put their \
wheels for $("$python" -V) into a folder and give it as WHEELS"
    done
done
[ -z "${WHEELS:-}" ] || for name in "${peers[@]}"; do
    "$python" -m pip show --quiet "$name" 2>/dev/null || install "$name" || true
done
"$python" "$root/bench/gpu_stages.py" "$@" --out "$out" "${rehearse[@]}"
