#!/usr/bin/env bash
# Train a small model on a folder of Python files, then let it complete a function header.
#
#   examples/train_on_your_code.sh path/to/code OUT [--section.key value ...]
#
# OUT gets two folders: OUT/data, the tokenised corpus, and OUT/run, the run with its export.
# Further words change the recipe; `train/pretrain.py --help` lists every key. A second call resumes the run.
set -euo pipefail
source=${1:?give a folder of .py files}
out=${2:?give a folder for the corpus and the run}
shift 2
pretrain=$(cd "$(dirname "$0")/.." && pwd)/train/pretrain.py

# 1. Documents -> shards of token ids, with a tokenizer trained on them. A tenth of the files is held out: the default,
#    one in fifty, is too little text in a small code base.
[ -d "$out/data" ] || phi1 prepare --source "$source" --tokenizer train --val-fraction 0.1 --out "$out/data"

# 2. Train. --nproc-per-node N uses N processes, or N GPUs, and gives the same losses.
torchrun --standalone "$pretrain" --data.folder "$out/data" --run.folder "$out/run" "$@"

# 3. Look at the run and use the model.
phi1 ledger "$out/run"
phi1 generate --model "$out/run/export" --prompt "def " --max-new-tokens 40 --temperature 0.7 --seed 1 --echo
