"""Run every operation on small inputs in float32 and in float16, which have different kernels, for compute-sanitizer.

The inputs are those of the registry's CPU cases, since a sanitizer slows kernels a hundredfold.
"""

from __future__ import annotations

import argparse
import sys

import torch

from phi1.bench.cases.block import small_block
from phi1.bench.cases.registry import select
from phi1.bench.harness import check
from phi1.bench.harness.case import Case, Inputs
from phi1.bench.harness.parser import on_a_gpu, plain_parser

ALWAYS_FLOAT32 = ("cos", "sin")


def chosen(dtype: torch.dtype) -> list[Case]:
    """Every operation with its backward if it has one; in float16 also forward alone, which launches other kernels."""
    cases = [case for case in (*select("cpu", units=("kernel", "block")), *small_block(p=0.1))
             if case.direction != "backward"]
    trained = {case.op for case in cases if case.direction == "forward+backward"}
    return [case for case in cases if dtype is torch.float16 or case.direction != "forward" or case.op not in trained]


def inputs_of(case: Case, device: torch.device, dtype: torch.dtype) -> Inputs:
    """The case's inputs in another precision, except those that are always float32."""
    given = case.draw(device)
    return {name: value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype is torch.float32
            and name not in ALWAYS_FLOAT32 else value for name, value in given.items()}


def run(options: argparse.Namespace) -> int:
    device = torch.device("cpu" if options.rehearse else "cuda")
    n_cases = 0
    for dtype in (torch.float32, torch.float16):
        for case in chosen(dtype):
            found = check.results(case, case.providers[0].prepare(case, device), inputs_of(case, device, dtype))
            name = case.name.replace("float32", str(dtype).removeprefix("torch."))
            for result, tensor in found.items():
                assert tensor.isfinite().all(), f"{name}: {result} is not finite"
            print(name, flush=True)
            n_cases += 1
    print(f"{n_cases} cases ran")
    return 0


if __name__ == "__main__":
    sys.exit(on_a_gpu(plain_parser("sanitize", __doc__), run))
