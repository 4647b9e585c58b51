"""Compile every Triton kernel for every GPU, at each tile that a table can pick. No GPU is needed.

Results are kept in a committed table, by Triton version, with a key of the kernel's source, of what the compiler is
told of its launch, of the target, and of how the compiler is called and its output read. What the table does not hold,
or holds with another key, is compiled again. Ends in one line, and in exit code 1 if a kernel is refused: `allowed.py`
says for what.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import triton

from phi1.arguments import path_option
from phi1.bench.compile.again import COMPILE_SECONDS, compile_again
from phi1.bench.compile.allowed import FILE, allowed, complaints, dumps, needed, unneeded
from phi1.bench.compile.arch import ARCHS, WIDE, Report, narrow
from phi1.bench.compile.launches import Case, measured
from phi1.bench.compile.pool import compile_all
from phi1.bench.compile.table import (
    VERSIONS,
    Chosen,
    Rows,
    chosen_cases,
    left_over,
    load,
    report_of,
    row_of,
    save,
    stale,
)
from phi1.bench.harness.files import replace
from phi1.bench.harness.parser import MakeParser, plain_parser

SHOWN_STALE = 5
UPDATE = "`phi1 bench static --update` under each Triton version mends it"


def main(argv: Sequence[str], make_parser: MakeParser = plain_parser) -> int:
    options = _parse(argv, make_parser)
    chosen = chosen_cases(triton.__version__, options.arch, options.only)
    if not chosen:
        return _refuse(f"--only {options.only!r}: no case has this in its name")
    if options.accept:
        return _accept(options.accept)
    failures, total = _check_table(options) if options.check else (_report(chosen, options), len(chosen))
    if options.sample or options.changed:
        failures += compile_again(chosen, options)
    outcome = f"{failures} of {total} refused" if failures else f"all {total} pass"
    versions = " and ".join(VERSIONS) if options.check else triton.__version__
    print(f"static gate, Triton {versions}: {outcome}", flush=True)
    return _under_others(argv, options.triton, 1 if failures else 0)


def _parse(argv: Sequence[str], make_parser: MakeParser = plain_parser) -> argparse.Namespace:
    parser = make_parser("phi1 bench static", (__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", action="append", choices=list(ARCHS), help="for this one alone; may be repeated")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--check", action="store_true",
                        help="compile nothing, and fail on what the table does not hold for any of its versions")
    parser.add_argument("--update", action="store_true", help="put what was compiled into the table")
    parser.add_argument("--all", action="store_true", help="compile everything, not only what is stale")
    parser.add_argument("--sample", type=int, default=0, metavar="N",
                        help="compile N cases of the table again, others each day, and fail where they differ")
    parser.add_argument("--changed", metavar="REF",
                        help="compile the rows of the table again that are not as they were in this commit, as many as "
                             "take about 2 minutes, and fail where the compiler says otherwise")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once (%(default)s)")
    parser.add_argument("--triton", action="append", default=[], metavar="DIR", type=path_option,
                        help="do the same with the Triton in this folder afterwards; may be repeated (made by "
                             "pip install --no-deps --target DIR triton==VERSION)")
    parser.add_argument("--accept", metavar="REASON",
                        help=f"compile nothing, and write what the table needs, and no more, into {FILE.name}; the "
                             "reason is for what is new there")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: an interpreted kernel cannot be compiled; unset it")
    if options.check and (options.update or options.all):
        parser.error("--check compiles nothing: leave out --update and --all")
    if options.accept is not None and (len(argv) > 2 or not options.accept.strip()):
        parser.error("--accept takes a reason, and goes alone")
    if options.changed == "":
        parser.error("--changed: must name a commit; got ''")
    if options.jobs < 1 or options.sample < 0:
        parser.error("--jobs must be at least 1 and --sample at least 0")
    for folder in options.triton:
        if not (folder / "triton" / "__init__.py").is_file():
            parser.error(f"--triton {folder}: there is no triton in this folder")
    return options


def _refuse(message: str) -> int:
    print(f"phi1 bench static: error: {message}", file=sys.stderr)
    return 2


def _report(chosen: Chosen, options: argparse.Namespace) -> int:
    """Print a line a case, compiling what is stale as it goes; returns how many are refused."""
    rows = load(triton.__version__)
    due = chosen if options.all else stale(rows, chosen)
    if due:
        if not rows:
            print(f"the table has no Triton {triton.__version__}, so all is compiled; --check compiles nothing and "
                  f"holds what it has, of {' and '.join(VERSIONS)}, against the sources in seconds")
        print(f"compiling {len(due)} of {len(chosen)}, {options.jobs} at once, about "
              f"{math.ceil(len(due) * COMPILE_SECONDS / options.jobs / 60)} min", flush=True)
    _print_header()
    refused, fresh = 0, {(arch, case.name) for arch, case in due}
    for arch, case in chosen:
        if (arch, case.name) not in fresh:
            refused += _print(case, arch, report_of(rows[arch][case.name]))
    compiled: Rows = {}
    saved = time.monotonic()
    for (arch, case), report in compile_all(due, options.jobs):
        refused += _print(case, arch, report)
        compiled.setdefault(arch, {})[case.name] = row_of(case, arch, report)
        if options.update and time.monotonic() - saved > 60:  # the whole matrix takes long; nothing of it is lost
            save(triton.__version__, compiled)
            saved = time.monotonic()
    if options.update:
        known = {(arch, case.name) for arch, case in chosen}
        save(triton.__version__, compiled, known=None if options.arch or options.only else known)
    return refused


def _print_header() -> None:
    print(f"{'kernel':58} {'arch':7} regs stack  shared warps held tensor   loads  stores"
          f"  (accesses of {WIDE} bytes + narrower)")


def _print(case: Case, arch: str, report: Report) -> bool:
    found = complaints(case, arch, report)
    verdict = "REFUSED: " + "; ".join(found) if found else "ok"
    if report.error:
        print(f"{case.name:58} {arch:7} {verdict}", flush=True)
        return True
    wide = [f"{sum(a.values()) - narrow(a)}+{narrow(a)}" if a else "0+0" for a in (report.loads, report.stores)]
    print(f"{case.name:58} {arch:7} {report.registers:4} {report.stack:5} {report.shared:7} {report.warps:5} "
          f"{report.occupancy(arch):4} {report.tensor_instructions:6} {wide[0]:>7} {wide[1]:>7}  {verdict}", flush=True)
    return bool(found)


def _check_table(options: argparse.Namespace) -> tuple[int, int]:
    """Hold the table against the sources, for each version, without compiling: how many cases fail, of how many."""
    whole = not (options.arch or options.only)
    failures = total = 0
    for version in VERSIONS:
        rows, chosen = load(version), chosen_cases(version, options.arch, options.only)
        total += len(chosen)
        old = {(arch, case.name) for arch, case in stale(rows, chosen)}
        lines: list[str] = []
        for arch, case in chosen:
            if (arch, case.name) not in old:
                found = complaints(case, arch, report_of(rows[arch][case.name]))
                lines += [f"{case.name} on {arch}: {'; '.join(found)}"] if found else []
        if whole:
            lines += [f"{name} is in the table, but no case of this name is left" for name in left_over(rows, chosen)]
            lines += [f"{row.name} {row.fault}" for row in measured() if row.fault]
        for line in lines:
            print(f"Triton {version}: {line}")
        failures += len(lines) + len(old)
        if old:
            names = [f"{name} on {arch}" for arch, name in sorted(old)]
            more = f" and {len(names) - SHOWN_STALE} more" if len(names) > SHOWN_STALE else ""
            print(f"Triton {version}: {len(old)} of {len(chosen)} are stale: {', '.join(names[:SHOWN_STALE])}{more}; "
                  f"{UPDATE}")
    if whole and not failures:
        lines = unneeded(_compiled(), allowed())
        failures += len(lines)
        print("".join(f"{line}\n" for line in lines), end="")
    return failures, total


def _compiled() -> Iterator[tuple[Case, str, Report]]:
    """Every case of the table with its report, of every version."""
    for version in VERSIONS:
        rows = load(version)
        for arch, case in chosen_cases(version):
            if case.name in rows.get(arch, {}):
                yield case, arch, report_of(rows[arch][case.name])


def _accept(reason: str) -> int:
    replace(FILE, dumps(needed(_compiled(), allowed(), reason)))
    print(f"phi1 bench static: {FILE} allows what the table needs")
    return 0


def _under_others(argv: Sequence[str], folders: Sequence[Path], code: int) -> int:
    """Run the same command with other Tritons; the largest exit code."""
    rest = list(argv)
    for _ in folders:
        at = next(i for i, word in enumerate(rest) if word == "--triton" or word.startswith("--triton="))
        del rest[at : at + (2 if rest[at] == "--triton" else 1)]
    for folder in folders:
        path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "phi1.bench.compile.report", *rest]
        code = max(code, subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
