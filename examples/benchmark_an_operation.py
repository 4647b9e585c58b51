"""Benchmark one operation beside its peers, and read the results file.

    python examples/benchmark_an_operation.py gelu
    python examples/benchmark_an_operation.py layer_norm --json results.json

`phi1 bench` checks every result against the float64 reference before a time counts. `phi1 bench --list` prints the
cases; docs/benchmarks.md explains the columns.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from phi1.cli.main import main as phi1


def main() -> int:
    parser = argparse.ArgumentParser(description="Time an operation beside its peers.")
    parser.add_argument("op", nargs="?", default="gelu")
    parser.add_argument("--json", type=Path, help="keep the results in this file")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the rounds of each case")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        file = args.json or Path(folder) / "results.json"
        code = phi1(["bench", "--op", args.op, "--quick", "--seconds", str(args.seconds), "--json", str(file)])
        if code:
            return code
        results = json.loads(file.read_text())

    environment = results["environment"]
    print(f"\nOn {environment['cpu']}, torch {environment['torch']}:")
    for case in results["cases"]:
        ours, *peers = case["providers"]
        print(f"{case['case']}: {ours['ms'][0]:.4g} ms, {100 * ours['roof_share']:.0f} % of the measured roof")
        for peer in peers:
            if peer["status"] == "ok":
                middle, low, high = peer["ratio"]
                print(f"    {peer['provider']} takes {middle:.2f} [{low:.2f}-{high:.2f}] times as long")
            else:  # an absent peer is a line, not a failure
                print(f"    {peer['provider']}: {peer['status']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
