#!/usr/bin/env bash
# All that wants a GPU, in stages of nine minutes at most, on a machine with PyTorch, Triton and transformers; check wants
# pytest and pytest-benchmark as well. Tests that need more are left out where it is missing, and named.
#
#   bench/gpu.sh STAGE [STAGE ...]         check kernels block train decode tune profile
#   bench/gpu.sh --rehearse [STAGE ...]    the same scripts on a CPU, with tiny shapes; without a stage all of them
#
# OUT          folder for results (default runs/gpu); what is done is in it as soon as it is done. A stage runs once at a
#              time in it
# WHEELS       folder of wheels: what lies in it and is not installed is taken from it, peers and what they depend on
# PYTHON       the interpreter that has PyTorch (default python3)
# PHI1_COMMIT  the sources' commit, for the results, where there is no .git: $(git rev-parse --short HEAD)
#
# Back in the repository, `phi1 bench report OUT` puts what OUT has into bench/results/<gpu>/<date>-<commit>.json, and
# its table into the README.
#
# The package runs from the source tree: links in a temporary folder map kernels/, train/ and bench/ into phi1.
set -euo pipefail
began=$(date +%s)
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
out=${OUT:-$root/runs/gpu}
stages=(check kernels block train decode tune profile)

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
[ -z "${WHEELS:-}" ] || [ -d "$WHEELS" ] || fail "WHEELS=$WHEELS is no folder"
[[ $python != */* || $python == /* ]] || python=$PWD/$python  # not through links: a virtual environment is one
found=0
"$python" -c 'import sys, torch, triton; sys.exit(0 if torch.cuda.is_available() else 3)' 2>/dev/null || found=$?
[[ $found == [03] ]] || fail "$python has no torch and triton; PYTHON names another"
[ "$found" = 0 ] || [ ${#rehearse[@]} -gt 0 ] || fail "$python finds no CUDA device; --rehearse runs on a CPU"

overlay=$(mktemp -d)
trap 'rm -rf "$overlay" || :' EXIT  # whose failure would be the script's
mkdir -p "$overlay/phi1" "$overlay/bin" "$overlay/site" "$out"
out=$(cd "$out" && pwd)
if [ -n "${WHEELS:-}" ]; then WHEELS=$(cd "$WHEELS" && pwd); fi
for path in "$root"/phi1/*; do ln -s "$path" "$overlay/phi1/"; done
for room in kernels train bench; do ln -s "$root/$room" "$overlay/phi1/$room"; done
cat > "$overlay/bin/phi1" <<END
#!/usr/bin/env bash
exec "$python" -c 'import sys; from phi1.cli.main import main; sys.exit(main())' "\$@"
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
needs() { "$python" "$root/bench/gpu/stages.py" --needs ${WHEELS:+--wheels "$WHEELS"} "$@"; }
before=''
missing=$(needs "$@")
while [ -n "$missing" ]; do
    lacking=''
    for name in $missing; do
        { [ "$missing" != "$before" ] && install "$name"; } || lacking+="${lacking:+, }$name"
    done
    [ -z "$lacking" ] || fail "stage $* needs Python packages that are missing: $lacking; put their wheels for \
$("$python" -V) into a folder and give it as WHEELS${WHEELS:+; $out/wheels.log says why pip took none from $WHEELS}"
    before=$missing
    missing=$(needs "$@")
done
[ -z "${WHEELS:-}" ] || for name in $("$python" "$root/bench/gpu/stages.py" --absent "$WHEELS" "$@"); do
    install "$name" || echo "gpu.sh: $name has a wheel, but cannot be installed: $out/wheels.log says why" >&2
done
# In the background, since bash acts on a signal only between commands; one may come before the number is known.
running='' stopped=''
stop() {
    stopped=1
    [ -z "$running" ] || kill "$running" 2>/dev/null || :
}
trap stop TERM INT HUP
"$python" "$root/bench/gpu/stages.py" "$@" --began "$began" --out "$out" "${rehearse[@]}" &
running=$!
[ -z "$stopped" ] || stop
code=0
wait "$running" || code=$?
while kill -0 "$running" 2>/dev/null; do wait "$running" || code=$?; done
exit "$code"
