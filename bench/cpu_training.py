"""Training on a CPU beside transformers' PhiForCausalLM: tokens/s, interleaved in one process, and peak memory.

    python bench/cpu_training.py [--vocab 51200 4096] [--tokens 256] [--rounds 12] [--memory] [--json FILE]

Both train 4 layers of width 256 on batches of 8 rows with fused AdamW, eager, in bf16. transformers uses sdpa
attention under autocast, its usual way; phi1 uses its trainer's own step (bf16 copies of fp32 parameters). Both compute
the gradients of the mean cross-entropy, clip their global norm at 1 and take an optimizer step. The speed of a shared
CPU changes by the minute, so rounds alternate between the two and the ratio of each pair counts. Each vocabulary has a
process of its own. Peak memory is the largest resident set of a process that takes 4 steps, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from phi1.arguments import path_option
from phi1.bench.harness.environment import environment
from phi1.bench.harness.files import replace
from phi1.bench.harness.parser import plain_parser
from phi1.bench.peers.training import Phi1Step, Plan, Step, TransformersStep, cpu_plan

STEPS: dict[str, Callable[[Plan], Step]] = {"phi1": Phi1Step, "transformers": TransformersStep}


def compare(plan: Plan, rounds: int) -> dict[str, Any]:
    """Alternate the two for `rounds` rounds after two of warm-up; tokens/s and the ratio of each round's pair."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    steps = {name: make(plan) for name, make in STEPS.items()}
    tokens = plan.batch * plan.tokens
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for turn in range(rounds + 2):
        for name in STEPS if turn % 2 else reversed(STEPS):
            begin = time.perf_counter()
            steps[name]()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begin)
    ratios = sorted(t / p for p, t in zip(seconds["phi1"], seconds["transformers"], strict=True))
    return {
        "vocab_size": plan.config.vocab_size, "tokens": plan.tokens, "rounds": rounds,
        **{f"{name}_tokens_per_s": round(tokens / statistics.median(seconds[name])) for name in STEPS},
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_p20_p80": [round(ratios[round(q * (len(ratios) - 1))], 3) for q in (0.2, 0.8)],
    }


def in_own_process(*arguments: str) -> str:
    """Run this script anew, since earlier work in a process changes its speed; the last line that it prints."""
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    return done.stdout.splitlines()[-1]


def own_peak_mib() -> float:
    """Largest resident set of this process, MiB. Not ru_maxrss: that starts at the size of the process that forked."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024


def main() -> None:
    parser = plain_parser("cpu_training", __doc__)
    parser.add_argument("--vocab", type=int, nargs="+", default=[51200, 4096], help="vocabulary sizes")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds for each vocabulary size")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, each in its own process")
    parser.add_argument("--json", type=path_option, help="write the results to this file as well")
    parser.add_argument("--peak-of", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--compare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"argument --rounds: must be 1 or more; got {args.rounds}")
    if not 1 <= args.tokens <= 2048:
        parser.error(f"argument --tokens: must be 1 to 2048; got {args.tokens}")
    plan = cpu_plan(args.vocab[0], args.tokens)
    if args.peak_of:
        step = STEPS[args.peak_of](plan)
        for _ in range(4):
            step()
        print(own_peak_mib())
        return
    if args.compare:
        print(json.dumps(compare(plan, args.rounds)))
        return
    rows = []
    for vocab_size in args.vocab:
        own = "--vocab", str(vocab_size), "--tokens", str(args.tokens)
        row = json.loads(in_own_process("--compare", *own, "--rounds", str(args.rounds)))
        print(f"V = {vocab_size}: phi1 {row['phi1_tokens_per_s']} tokens/s, transformers "
              f"{row['transformers_tokens_per_s']}: {row['ratio_median']}x (p20-p80 {row['ratio_p20_p80']})")
        if args.memory:
            row |= {f"{name}_peak_mib": round(float(in_own_process("--peak-of", name, *own))) for name in STEPS}
            row["memory_ratio"] = round(row["phi1_peak_mib"] / row["transformers_peak_mib"], 3)
            print(f"V = {vocab_size}: peak memory phi1 {row['phi1_peak_mib']} MiB, transformers "
                  f"{row['transformers_peak_mib']} MiB: {row['memory_ratio']}x")
        rows.append(row)
    if args.json:
        whole = {"benchmark": "cpu_training", "environment": environment("cpu"), "rows": rows}
        replace(Path(args.json), json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
