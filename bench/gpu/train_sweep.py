"""Train phi-1's full shape with the trainer itself at several micro-batch sizes, and read each run's ledger.

    python bench/gpu/train_sweep.py --out DIR [--minutes 8] [--micro-batches 8 16 24 48]

Each size is a run of `train/pretrain.py` on this Python's standard library, in fp16 and with the same batches. It is
killed after STEPS steps, before it would write 16 GB of checkpoint. The fastest size runs once more with phi-1's
dropout. Sizes grow until one does not fit. DIR/train.json holds tokens/s, MFU, peak memory and losses of every size;
`phi1 plan` takes its MFU from such a file in bench/results/. --rehearse trains a tiny model on the CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from phi1 import Phi1Config, preset
from phi1.arguments import path_option
from phi1.bench.harness.environment import ROOT, environment
from phi1.bench.harness.files import replace
from phi1.bench.harness.parser import on_a_gpu, plain_parser
from phi1.train.metrics.ledger import read_ledger

STEPS, WARM_UP = 8, 2  # the first steps compile kernels and fill the allocator
DROPOUT = 0.1
TIME_UP = "the time was up"
BATCH = 48  # sequences of a step, for every size
COMMON = {"checkpoint.every": 0, "eval.completions": 0, "run.tensorboard": "false", "train.steps": 10_000,
          "train.warmup_steps": STEPS // 2, "train.lr": 3e-4}
FULL = {"model.preset": "phi1", "data.tokenizer": "microsoft/phi-1", "data.seq_len": 2048, "train.batch_size": BATCH,
        "train.precision": "fp16", "run.device": "cuda"} | COMMON
TINY = {"model.preset": "nano", "model.hidden_size": 64, "model.intermediate_size": 256, "model.num_attention_heads": 1,
        "model.num_hidden_layers": 2, "data.source": str(Path(json.__file__).parent), "data.vocab_size": 512,
        "data.seq_len": 32, "train.batch_size": 4, "train.precision": "fp32", "run.device": "cpu"} | COMMON


def measure(out: Path, micro_batch: int, dropout: float, recipe: dict[str, Any], end: float) -> dict[str, Any]:
    """One run, killed when its ledger has STEPS steps; {"error": ...} for a run that has ended before."""
    folder, log = out / "run", out / f"micro-batch-{micro_batch}{'-dropout' if dropout else ''}.log"
    shutil.rmtree(folder, ignore_errors=True)
    changes = recipe | {"train.micro_batch_size": micro_batch, "train.dropout": dropout, "run.folder": folder,
                        "data.folder": out / "data"}
    words = [f"--{key}={value}" for key, value in changes.items()]
    steps: list[dict[str, Any]] = []
    command = [sys.executable, str(ROOT / "train" / "pretrain.py"), *words]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            while len(steps) < STEPS and process.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
                steps = steps_of(folder / "ledger.jsonl")
        finally:
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)
    found = {"micro_batch": micro_batch, "dropout": dropout}
    if len(steps) < STEPS:
        said = (log.read_text().strip().splitlines() or ["nothing was printed"])[-1]
        return found | {"error": said if time.monotonic() < end else TIME_UP}
    return found | figures(steps[:STEPS])


def steps_of(ledger: Path) -> list[dict[str, Any]]:
    """The lines of steps; none where the run has not begun to write."""
    return [line for line in read_ledger(ledger) if "step" in line] if ledger.is_file() else []


def figures(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a run; MFU if the peak of the GPU is known."""
    measured = [step["measured"] for step in steps]
    mfu = [each["mfu"] for each in measured[WARM_UP:] if "mfu" in each]
    return {"tokens_per_s": round(statistics.median(each["tokens_per_s"] for each in measured[WARM_UP:])),
            "mfu": round(statistics.median(mfu), 4) if mfu else None,
            "peak_gib": round(max(each["memory_gib"] for each in measured), 2),
            "skipped": sum(step["skipped"] for step in steps), "losses": [step["loss"] for step in steps]}


def sweep(out: Path, micro_batches: list[int], recipe: dict[str, Any], end: float) -> list[dict[str, Any]]:
    """Growing sizes until one fails or the time is up, then the fastest once more with dropout."""
    rows: list[dict[str, Any]] = []
    for micro_batch in micro_batches:
        rows.append(measure(out, micro_batch, 0.0, recipe, end))
        report(rows[-1])
        if "error" in rows[-1]:
            break
    if (best := fastest(rows)) and time.monotonic() < end:
        rows.append(measure(out, best["micro_batch"], DROPOUT, recipe, end))
        report(rows[-1])
    return rows


def fastest(rows: list[dict[str, Any]], dropout: float = 0.0) -> dict[str, Any] | None:
    """The fastest size that ran; None if none did."""
    ran = [row for row in rows if "error" not in row and row["dropout"] == dropout]
    return max(ran, key=lambda row: row["tokens_per_s"], default=None)


def report(row: dict[str, Any]) -> None:
    head = f"micro-batch {row['micro_batch']:3}, dropout {row['dropout']}: "
    print(head + (row["error"] if "error" in row else
                  f"{row['tokens_per_s']:,} tokens/s, MFU {row['mfu'] or 'unknown'}, {row['peak_gib']} GiB, "
                  f"loss {row['losses'][0]:.3f} -> {row['losses'][-1]:.3f}"), flush=True)


def result(rows: list[dict[str, Any]], recipe: dict[str, Any]) -> dict[str, Any]:
    """The content of train.json: all rows, and the fastest size's figures as `phi1 plan` reads them."""
    best, dropped = fastest(rows), fastest(rows, DROPOUT)
    content: dict[str, Any] = {"environment": environment(recipe["run.device"]), "tokens": recipe["data.seq_len"],
                               "batch": recipe["train.batch_size"], "rows": rows}
    if best:
        config, tokens = shape(recipe), recipe["data.seq_len"]
        content |= best | {"flops_per_token": {"without attention": config.flops_per_token(0),
                                               "with attention": config.flops_per_token(tokens),
                                               "causal": config.flops_per_token(tokens, causal=True)}}
    if dropped:
        content["tokens_per_s_dropout_0.1"] = dropped["tokens_per_s"]
    ran = [row for row in rows if "error" not in row and not row["dropout"]]
    if len(ran) > 1:  # the rest of the peak does not depend on the size
        content["gib_a_sequence"] = round((ran[-1]["peak_gib"] - ran[0]["peak_gib"])
                                          / (ran[-1]["micro_batch"] - ran[0]["micro_batch"]), 3)
    return content


def shape(recipe: dict[str, Any]) -> Phi1Config:
    """The model's shape."""
    changes = {key.removeprefix("model."): value for key, value in recipe.items() if key.startswith("model.")}
    return preset(changes.pop("preset"), **changes)


def main() -> int:
    parser = plain_parser("train_sweep", __doc__)
    parser.add_argument("--out", type=path_option, required=True, help="folder of train.json, the logs and the corpus")
    parser.add_argument("--micro-batches", type=int, nargs="+", metavar="N", help="sizes to try, growing")
    parser.add_argument("--minutes", type=float, default=8.0, help="end after this long (%(default)s)")
    return on_a_gpu(parser, run)


def run(options: argparse.Namespace) -> int:
    recipe, sizes = (TINY, [1, 2]) if options.rehearse else (FULL, [8, 16, 24, 48])
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = sweep(out, options.micro_batches or sizes, recipe, time.monotonic() + 60 * options.minutes)
    replace(out / "train.json", json.dumps(result(rows, recipe), indent=1) + "\n")
    broken = [row for row in rows if "memory" not in row.get("error", "memory") and row["error"] != TIME_UP]
    best = fastest(rows)
    return 0 if best and best["losses"][-1] < best["losses"][0] and not broken else 1


if __name__ == "__main__":
    sys.exit(main())
