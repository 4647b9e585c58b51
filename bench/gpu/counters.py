"""Hardware counters of phi1's slowest kernels in a training micro-step, by Nsight Compute if it is installed.

    python bench/gpu/counters.py --out DIR     a trace of a micro-step, then ncu on the three slowest Triton kernels
    python bench/gpu/counters.py --step        one micro-step of two layers, which ncu watches

DIR gets the trace (trace.json, for chrome://tracing) and for each kernel ncu's report and its details as text.
--rehearse takes a tiny model on the CPU and runs no ncu.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from phi1 import Phi1, preset
from phi1.arguments import path_option
from phi1.bench.cases.registry import select
from phi1.bench.harness.parser import on_a_gpu, plain_parser
from phi1.bench.report import trace
from phi1.train.metrics.profiling import check_place

COUNTED = 3
# Nsight Compute would otherwise lock the clocks, which are not ours to set.
NCU = ("ncu", "--clock-control", "none", "--target-processes", "all", "--launch-skip", "2", "--launch-count", "1",
       "--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis", "--section", "Occupancy",
       "--section", "LaunchStats", "--section", "WarpStateStats")
SHOWN = re.compile(r"(Compute \(SM\) Throughput|DRAM Throughput|Achieved Occupancy|Registers Per)")


def micro_step(rehearse: bool) -> None:
    """Forward and backward of two layers at phi-1's shape, B = 8."""
    name, device, dtype, shape = ("nano", "cpu", torch.float32, (2, 64)) if rehearse else \
        ("phi1", "cuda", torch.float16, (8, 2048))
    model = Phi1(preset(name, num_hidden_layers=2), device=device, dtype=dtype)
    model.init_weights(1)
    ids = torch.randint(model.config.vocab_size, (shape[0], shape[1] + 1), device=device)
    model.loss(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()


def slowest(out: Path, device: str) -> list[str]:
    """Trace a micro-step of the whole model, print its table, and name our slowest kernels."""
    lines = trace.record(select(device, ["micro-step"], quick=True)[0], torch.device(device), out / "trace.json")
    print(trace.as_table(lines))
    return [line.name for line in lines if line.name in trace.our_kernels()][:COUNTED]


def count(name: str, out: Path) -> bool:
    """Run ncu on one kernel and print the main figures; False if it failed."""
    report = out / name
    command = [*NCU, "--kernel-name", f"regex:^{name}", "-f", "-o", str(report), sys.executable, __file__, "--step"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=85)
        details = subprocess.run(["ncu", "--import", f"{report}.ncu-rep", "--page", "details"], capture_output=True,
                                 text=True, timeout=30)
    except subprocess.TimeoutExpired:
        print(f"{name}: ncu ran out of time")
        return False
    report.with_suffix(".txt").write_text(details.stdout + details.stderr + done.stderr)
    if done.returncode:
        print(f"{name}: {((done.stdout + done.stderr).strip().splitlines() or ['ncu said nothing'])[-1]}")
        return False
    print("\n  ".join([name, *(line.strip() for line in details.stdout.splitlines() if SHOWN.search(line))]))
    return True


def main() -> int:
    parser = plain_parser("counters", __doc__)
    parser.add_argument("--out", type=path_option, default=Path("."),
                        help="folder of the trace and the reports (%(default)s)")
    parser.add_argument("--step", action="store_true", help="run one micro-step of two layers")
    return on_a_gpu(parser, run)


def run(options: argparse.Namespace) -> int:
    if options.step:
        for _ in range(2):
            micro_step(options.rehearse)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    check_place(options.out / "trace.json")
    names = slowest(options.out, "cpu" if options.rehearse else "cuda")
    if options.rehearse or shutil.which("ncu") is None:
        micro_step(options.rehearse)
        print("no counters: " + ("a rehearsal" if options.rehearse else "ncu is not on the PATH"))
        return 0
    counted = [count(name, options.out) for name in names]
    return 0 if all(counted) else 1


if __name__ == "__main__":
    sys.exit(main())
