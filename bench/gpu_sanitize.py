"""Run every operation once, forward and backward, on small inputs: what compute-sanitizer watches.

The inputs are those of the registry's CPU cases, so that a sanitizer that slows a kernel a hundredfold is done soon.
"""

from __future__ import annotations

import argparse
import sys

import torch

from phi1.bench import check
from phi1.bench.cases import select


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    options = parser.parse_args()
    device = torch.device("cpu" if options.rehearse else "cuda")
    cases = [case for case in select("cpu", units=("kernel", "block")) if case.direction == "forward+backward"]
    for case in cases:
        inputs = case.inputs(device, torch.Generator(device).manual_seed(1))
        found = check.results(case, case.providers[0].prepare(case, device), inputs, None)
        for name, tensor in found.items():
            assert tensor.isfinite().all(), f"{case.name}: {name} is not finite"
        print(case.name, flush=True)
    print(f"{len(cases)} cases ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
