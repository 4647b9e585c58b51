"""Where a training micro-step spends its time, and what the counters say of our slowest kernels.

    python bench/gpu_profile.py trace --out DIR       trace.json for chrome://tracing, kernels.json and a table
    python bench/gpu_profile.py counters --out DIR    Nsight Compute on the three slowest Triton kernels, if it is there
    python bench/gpu_profile.py step                  one micro-step of two layers, for Nsight Compute to watch
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from phi1 import Phi1, preset
from phi1.bench.harness.files import replace
from phi1.bench.report.trace import kind_of
from phi1.train.metrics.profiling import check_place, write_trace

TRACE, KERNELS = "trace.json", "kernels.json"
COUNTED = 3
# Nsight Compute would otherwise lock the clocks, which are not ours to set.
NCU = ("ncu", "--clock-control", "none", "--target-processes", "all", "--launch-skip", "2", "--launch-count", "1",
       "--section", "SpeedOfLight", "--section", "MemoryWorkloadAnalysis", "--section", "Occupancy",
       "--section", "LaunchStats", "--section", "WarpStateStats")


def micro_step(rehearse: bool, layers: int = 0) -> Any:
    """A function that runs forward and backward of the loss at phi-1's shape, B = 8."""
    if rehearse:
        config, device, dtype, shape = preset("nano", num_hidden_layers=2), "cpu", torch.float32, (2, 64)
    else:
        config, device, dtype, shape = preset("phi1", **({"num_hidden_layers": layers} if layers else {})), "cuda", \
            torch.float16, (8, 2048)
    model = Phi1(config, device=device, dtype=dtype)
    model.init_weights(1)
    ids = torch.randint(config.vocab_size, (shape[0], shape[1] + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model.loss(inputs, targets).backward()

    return run


def trace(out: Path, rehearse: bool) -> int:
    """One micro-step after two of warm-up."""
    check_place(out / TRACE)
    run = micro_step(rehearse)
    run()
    run()
    activities = [ProfilerActivity.CPU] + ([] if rehearse else [ProfilerActivity.CUDA])
    with profile(activities=activities) as recorded:
        run()
        if not rehearse:
            torch.cuda.synchronize()
    write_trace(recorded, out / TRACE)
    rows = kernel_rows(recorded, rehearse)
    replace(out / KERNELS, json.dumps(rows, indent=1) + "\n")
    total = sum(row["ms"] for row in rows)
    print(f"{'kernel':60} {'calls':>5} {'ms':>9} {'share':>6}")
    for row in rows[:25]:
        print(f"{row['name'][:60]:60} {row['calls']:5} {row['ms']:9.3f} {100 * row['ms'] / total:5.1f}%")
    ours = sum(row["ms"] for row in rows if row["ours"])
    print(f"one micro-step: {total:.2f} ms in kernels, {100 * ours / total:.1f} % of them ours")
    return 0


def kernel_rows(recorded: profile, rehearse: bool) -> list[dict[str, Any]]:
    """Name, calls and milliseconds of every kernel (on a CPU: of every operator), the slowest first."""
    rows = []
    for event in recorded.key_averages():
        on_device = str(getattr(event, "device_type", "")).endswith("CUDA")
        micros = event.self_cpu_time_total if rehearse else event.self_device_time_total
        if micros and (rehearse or on_device):
            rows.append({"name": event.key, "calls": event.count, "ms": micros / 1e3,
                         "ours": kind_of(event.key) == "phi1"})
    return sorted(rows, key=lambda row: -row["ms"])


def counters(out: Path, rehearse: bool) -> int:
    """Nsight Compute, a process for each kernel."""
    path = out / KERNELS
    if not path.is_file():
        print(f"gpu_profile: error: {path} is not there; run `trace` first", file=sys.stderr)
        return 2
    names = [row["name"] for row in json.loads(path.read_text()) if row["ours"]][:COUNTED]
    if rehearse or shutil.which("ncu") is None:
        micro_step(rehearse, layers=2)()
        print("no counters: " + ("a rehearsal" if rehearse else "ncu is not on the PATH"))
        return 0
    failed = 0
    for name in names:
        command = [*NCU, "--kernel-name", f"regex:^{name}", "-f", "-o", str(out / name), sys.executable, __file__,
                   "step"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=85)
            details = subprocess.run(["ncu", "--import", str(out / f"{name}.ncu-rep"), "--page", "details"],
                                     capture_output=True, text=True, timeout=30)
        except subprocess.TimeoutExpired:
            print(f"{name}: ncu ran out of time")
            failed += 1
            continue
        (out / f"{name}.txt").write_text(details.stdout + details.stderr + done.stderr)
        shown = [line.strip() for line in details.stdout.splitlines()
                 if re.search(r"(Compute \(SM\) Throughput|DRAM Throughput|Achieved Occupancy|Registers Per)", line)]
        print("\n  ".join([name, *shown]) if done.returncode == 0 else f"{name}: {_last(done.stdout + done.stderr)}")
        failed += done.returncode != 0
    return 1 if failed else 0


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["ncu said nothing"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("part", choices=("trace", "counters", "step"))
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu_profile: error: there is no CUDA device; --rehearse takes the CPU", file=sys.stderr)
        return 2
    if options.part == "step":
        run = micro_step(options.rehearse, layers=2)
        run()
        run()
        return 0
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        return {"trace": trace, "counters": counters}[options.part](options.out, options.rehearse)
    except OSError as error:
        print(f"gpu_profile: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
