"""Compile rows of the committed table again and hold what comes of it against them: the rows that a change has touched,
and a sample of the others, another one each day.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

import triton

from phi1.bench.compile.pool import compile_all
from phi1.bench.compile.table import Chosen, Rows, load, load_at, report_of, stale

COMPILE_SECONDS = 3  # of a case: 1 to 5
CHANGED_SECONDS = 120  # for rows that have changed, about; what takes longer is left to other days


def compile_again(chosen: Chosen, options: argparse.Namespace) -> int:
    """Compile what `--changed` and `--sample` ask for; returns how many rows differ from what the compiler says.

    A row that the table holds for other source counts for neither: it is stale, which is refused elsewhere.
    """
    rows = load(triton.__version__)
    old = {(arch, case.name) for arch, case in stale(rows, chosen)}
    today = datetime.now(UTC).date().isoformat()
    held = [(arch, case.name) for arch, case in chosen if (arch, case.name) not in old]
    held.sort(key=lambda job: hashlib.sha256(f"{today}{job[0]}{job[1]}".encode()).digest())
    changed = _changed(rows, held, options) if options.changed else []
    sample = [job for job in held if job not in changed][: options.sample]
    why = dict.fromkeys(sample, f"sample of {today}") | dict.fromkeys(changed, f"changed since {options.changed}")
    failures, by_job = 0, {(arch, case.name): case for arch, case in chosen}
    for (arch, case), report in compile_all([(job[0], by_job[job]) for job in (*changed, *sample)], options.jobs):
        job = arch, name = arch, case.name
        before = report_of(rows[arch][name])
        same = report == before
        print(f"{why[job]}, Triton {triton.__version__}: {name} on {arch}: "
              + ("as in the table" if same else f"REFUSED: it is now {report}, in the table {before}"), flush=True)
        failures += not same
    return failures


def _changed(rows: Rows, held: Sequence[tuple[str, str]], options: argparse.Namespace) -> list[tuple[str, str]]:
    """The first of the rows that are not those of another commit, as many as there is time for."""
    version = f"Triton {triton.__version__}"
    try:
        then = load_at(options.changed, triton.__version__)
    except LookupError as error:
        print(f"--changed {options.changed}, {version}: no row is compiled again for it: {error}", flush=True)
        return []
    found = [(arch, name) for arch, name in held if then.get(arch, {}).get(name) != rows[arch][name]]
    chosen = found[: CHANGED_SECONDS * options.jobs // COMPILE_SECONDS]
    left = f", {len(found) - len(chosen)} left out for want of time" if len(chosen) < len(found) else ""
    print(f"--changed {options.changed}, {version}: {len(found)} rows are not as they were there, "
          f"{len(chosen)} of them compiled again{left}", flush=True)
    return chosen
