"""`phi1 bench`: run cases and print their tables, or one of the commands report, compare, trace and static."""

from __future__ import annotations

import argparse
import difflib
import importlib
import math
import sys
import time
from typing import Any

from phi1.arguments import path_option
from phi1.bench.harness.parser import MakeParser, choose_device
from phi1.bench.harness.processes import sigterm_as_ctrl_c

COMMANDS = {
    "report": ("phi1.bench.report.report", "tables of docs/benchmarks.md and plots, from results files"),
    "compare": ("phi1.bench.report.compare", "what got faster or slower between two results files"),
    "trace": ("phi1.bench.report.trace", "a Chrome trace and a table of time by operation of one unit"),
    "static": ("phi1.bench.compile.report", "what the compiler makes of every kernel, without a GPU"),
}
LOST = 3
"""Exit code after a provider lost the GPU's context; with --json the same command continues without it."""
DESCRIPTION = "Measure phi1's operations and units beside their peers; a time counts once its result is right."


def main(argv: list[str], make_parser: MakeParser) -> int:
    """Run `phi1 bench ARGV`; exit code 1 if phi1 failed or computed something wrong, LOST if the GPU is lost."""
    with sigterm_as_ctrl_c():
        if argv and argv[0] in COMMANDS:
            return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:], make_parser)
        args = parse(argv, make_parser)
        if args.list:
            return list_cases(args)
        return run(args)


def parse(argv: list[str], make_parser: MakeParser) -> argparse.Namespace:
    parser = make_parser("phi1 bench", DESCRIPTION)
    lines = "\n".join(f"  {name:<9} {what}" for name, (_, what) in COMMANDS.items())
    parser.epilog = f"commands:\n{lines}\n\n`phi1 bench COMMAND --help` says what each takes."
    parser.usage = "phi1 bench [COMMAND] [OPTIONS]"
    if argv and not argv[0].startswith("-"):
        close = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        parser.error(f"there is no command {argv[0]!r}; "
                     + (f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"))
    parser.add_argument("--op", nargs="+", default=[], metavar="OP", help="only these operations or units of work")
    parser.add_argument("--unit", nargs="+", default=[], choices=("kernel", "block", "model", "host"),
                        help="only these kinds of case: kernel, block, model, host")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--peers", nargs="*", metavar="PEER",
                        help="only these peers beside phi1, none if none is named; without it all that suit the device")
    parser.add_argument("--quick", action="store_true",
                        help="one shape an operation, less time for each, no peers tuned for minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="without it cuda where there is a device")
    parser.add_argument("--seconds", type=float, help="time for the rounds of a case (4; 1 with --quick)")
    parser.add_argument("--minutes", type=float, help="start no case after this long; those not reached are named")
    parser.add_argument("--last", type=path_option, metavar="FILE",
                        help="cases that this results file has come last, without those who lost the GPU there")
    parser.add_argument("--json", type=path_option, metavar="FILE",
                        help="write the results to this file, case by case; after exit code 3, a peer that lost the "
                             "GPU, the same command goes on without it")
    parser.add_argument("--save", action="store_true",
                        help="write the results to bench/results/<machine>/, beside those of earlier runs")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and of their providers")
    args = parser.parse_args(argv)
    for name, value in (("seconds", args.seconds), ("minutes", args.minutes)):
        if value is not None and not 0 < value < math.inf:
            parser.error(f"argument --{name}: must be finite and more than 0; got {value}")
    if args.json and args.save:
        parser.error("give the results' place in one way: --json FILE or --save")
    return args


def chosen_cases(args: argparse.Namespace) -> list[Any]:
    from phi1.bench.cases.registry import select
    from phi1.bench.report.results import read

    cases = select(args.device, args.op, args.unit, args.case, args.quick)
    known = sorted({provider.name for case in cases for provider in case.providers[1:]})
    unknown = [name for name in args.peers or [] if name not in known]
    if unknown:
        raise ValueError(f"--peers: no case has a peer {unknown[0]!r}; they have {', '.join(known)}")
    done = {record["case"] for record in read(args.last)["cases"]} if args.last else set()
    return sorted(cases, key=lambda case: case.name in done)


def list_cases(args: argparse.Namespace) -> int:
    """Print the selection. A GPU's cases can be listed without a GPU."""
    args.device = args.device or "cuda"
    for case in chosen_cases(args):
        print(f"{case.unit:<6}  {case.name}  [{', '.join(p.name for p in case.providers if args.device in p.devices)}]")
    return 0


def run(args: argparse.Namespace) -> int:
    import torch

    from phi1.bench.harness.environment import about, environment
    from phi1.bench.harness.runner import DeviceLostError, Runner
    from phi1.bench.report.results import ResultsFile, lost_in, read, standard_path

    choose_device(args)
    cases = chosen_cases(args)
    facts = environment(args.device)
    seconds = args.seconds or (1.0 if args.quick else 4.0)
    settings = {"quick": args.quick, "seconds": seconds, "peers": args.peers}
    file = ResultsFile(standard_path(facts) if args.save else args.json, facts, settings, beside=args.save)
    lost = (lost_in(read(args.last)) if args.last else {}) | file.lost
    runner = Runner(torch.device(args.device), args.peers, seconds, args.quick, lost)
    print(about(facts))
    try:
        unreached = [case.name for case in measure(cases, runner, file, args.minutes)]
    except DeviceLostError as error:
        print(f"phi1 bench: {error}; " + ("the" if args.json else "with --json FILE the") + " same command goes on "
              f"without {error.provider} there", file=sys.stderr)
        return LOST
    if torch.distributed.is_initialized():  # by a training step
        torch.distributed.destroy_process_group()
    if file.path and file.path.exists():  # it is not where --save had no case to write
        print(f"phi1 bench: results written to {file.path}", file=sys.stderr)
    if unreached:
        print(f"phi1 bench: {len(unreached)} of {len(cases)} cases were not reached in {args.minutes:g} minutes: "
              f"{'; '.join(unreached)}", file=sys.stderr)
    done = file.content["cases"]
    failed = sum(record["providers"][0]["status"] != "ok" for record in done)
    if failed:
        print(f"phi1 bench: phi1 failed in {failed} of {len(done)} cases", file=sys.stderr)
    return 1 if failed else 0


def measure(cases: list[Any], runner: Any, file: Any, minutes: float | None) -> list[Any]:
    """Run, print and write the cases one after another; returns those for which there was no time.

    Raises:
        DeviceLostError: its line names the case and the provider, whose record is in the file.
    """
    from phi1.bench.harness.runner import DeviceLostError
    from phi1.bench.report import table

    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    unit, cases = "", [case for case in cases if case.name not in file.finished]
    for number, case in enumerate(cases):
        if time.monotonic() > end:
            return cases[number:]
        try:
            record = runner.run(case)
        except DeviceLostError as error:
            file.add_cut(error.record, error.provider, f"took the GPU's context with it in an earlier run: {error}")
            error.args = (f"{case.name}: {error.provider}: {error}",)
            raise
        file.add(record)
        if case.unit != unit:
            unit = case.unit
            print(table.heading(unit))
        print(table.block(record), flush=True)
    return []
