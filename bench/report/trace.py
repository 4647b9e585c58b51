"""`phi1 bench trace`: a Chrome trace of one unit of work and a table of its time by operation.

The table names our kernels and counts matrix products apart; a fused kernel could still take over the rest. On a GPU it
counts time on the device, on a CPU the time in each operation without the operations that it calls.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from phi1.arguments import path_option
from phi1.bench.harness.case import Case
from phi1.bench.harness.environment import ROOT
from phi1.bench.harness.parser import MakeParser, choose_device
from phi1.bench.harness.runner import bind
from phi1.train.metrics.profiling import check_place, write_trace

WARM_UP, STEPS = 3, 2
KINDS = ("phi1", "product", "copy", "communication", "other")
# cuBLAS' and CUTLASS' kernels, ROCm's Tensile (Cijk), and PyTorch's products on a CPU.
_PRODUCT = re.compile(r"gemm|gemv|cublas|cutlass|nvjet|xmma|splitKreduce|Cijk_|^aten::(mm|addmm|bmm|baddbmm|mv|addmv|"
                      r"linear|mkldnn_linear|matmul)$|mkl|onednn", re.IGNORECASE)
_COPY = re.compile(r"memcpy|memset|^aten::(copy_|_to_copy|fill_|zero_)$", re.IGNORECASE)
_COMMUNICATION = re.compile(r"nccl|rccl|gloo|c10d", re.IGNORECASE)


@dataclass
class Line:
    """The time of everything of one name."""

    name: str
    kind: str
    ms: float
    calls: int


@cache
def our_kernels() -> frozenset[str]:
    """Names of the Triton kernels of `phi1.kernels`, read from the sources: importing them needs Triton."""
    sources = Path(ROOT / "kernels").rglob("*_triton.py")
    found = (re.findall(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+)", path.read_text(), re.MULTILINE) for path in sources)
    return frozenset(name for names in found for name in names)


def kind_of(name: str) -> str:
    """The kind, one of KINDS, by the name of a kernel, an operation, or an operation's autograd node."""
    if name.startswith("phi1::") or "GeneratedBackwardFor_phi1_" in name or name in our_kernels():
        return "phi1"
    for kind, pattern in (("communication", _COMMUNICATION), ("copy", _COPY), ("product", _PRODUCT)):
        if pattern.search(name):
            return kind
    return "other"


def summarise(events: list[Any], device: str, steps: int) -> list[Line]:
    """The lines of one step, longest first.

    Args:
        events: of torch.profiler, `prof.events()`.
        device: "cuda" takes the device's events, "cpu" the operations' own time.
        steps: how many were recorded.
    """
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        on_cpu = event.device_type == DeviceType.CPU
        if getattr(event, "is_user_annotation", False) or on_cpu != (device == "cpu"):
            continue
        times[event.name].append(event.self_cpu_time_total if on_cpu else event.time_range.elapsed_us())
    lines = [Line(name, kind_of(name), sum(us) / steps / 1e3, round(len(us) / steps)) for name, us in times.items()]
    return sorted((line for line in lines if line.ms > 0), key=lambda line: line.ms, reverse=True)


def as_table(lines: list[Line], longest: int = 25) -> str:
    """The longest lines, then a sum for each kind."""
    total = sum(line.ms for line in lines) or 1.0
    rows = [f"{'ms a step':>10} {'share':>6} {'calls':>6}  {'kind':<13} name"]
    rows += [f"{line.ms:>10.3f} {100 * line.ms / total:>5.1f}% {line.calls:>6}  {line.kind:<13} {line.name[:90]}"
             for line in lines[:longest]]
    if len(lines) > longest:
        rest = lines[longest:]
        rows.append(f"{sum(line.ms for line in rest):>10.3f} {100 * sum(line.ms for line in rest) / total:>5.1f}% "
                    f"{sum(line.calls for line in rest):>6}  {'':<13} {len(rest)} others")
    rows.append("")
    for kind in KINDS:
        part = [line for line in lines if line.kind == kind]
        if part:
            ms = sum(line.ms for line in part)
            rows.append(f"{ms:>10.3f} {100 * ms / total:>5.1f}% {sum(line.calls for line in part):>6}  {kind}")
    return "\n".join(rows)


def record(case: Case, device: torch.device, out: Path) -> list[Line]:
    """Run phi1's side of a case under the profiler; writes the trace to `out`."""
    from torch.profiler import ProfilerActivity, profile

    call = bind(case, case.providers[0].prepare(case, device), [case.draw(device)])
    for number in range(WARM_UP):
        call(number)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for number in range(STEPS):
            call(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
    write_trace(profiler, out)
    return summarise(list(profiler.events() or []), device.type, STEPS)


def main(argv: list[str], make_parser: MakeParser) -> int:
    from phi1.bench.cases.registry import operations, select

    parser = make_parser("phi1 bench trace", "Where the time of one unit of work goes: a Chrome trace and a table.")
    parser.add_argument("--unit", required=True, metavar="NAME", help=f"one of {', '.join(operations())}")
    parser.add_argument("--case", default="", metavar="TEXT", help="the case whose name contains this; else the first")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="without it cuda where there is a device")
    parser.add_argument("--out", type=path_option, metavar="FILE", help="the trace (trace-NAME.json), for chrome://tracing")
    args = parser.parse_args(argv)
    if args.unit not in operations():
        parser.error(f"argument --unit: there is no {args.unit!r}; there are {', '.join(operations())}")
    choose_device(args)
    # A case that gradients flow through says most.
    chosen = select(args.device, [args.unit], text=args.case)
    case = next((case for case in chosen if case.direction == "forward+backward"), chosen[0])
    out = args.out or Path(f"trace-{args.unit}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_place(out)
    lines = record(case, torch.device(args.device), out)
    if torch.distributed.is_initialized():  # by a training step
        torch.distributed.destroy_process_group()
    print(f"{case.name}, {STEPS} steps; trace in {out}\n")
    print(as_table(lines))
    return 0
