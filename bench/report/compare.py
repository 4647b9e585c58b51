"""`phi1 bench compare A B`: what got faster or slower between two results files, beyond their noise.

Times of a GPU are compared directly. The speed of a CPU changes by the minute, so its times count in units measured in
the same rounds: a peer's time if both files have one, else the roof's. The noise of a number is the distance of its p20
or p80 from its median. Two numbers differ if they do so by more than both noises and a floor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from phi1.arguments import path_option
from phi1.bench.harness.environment import device_name
from phi1.bench.harness.parser import MakeParser
from phi1.bench.report.results import read, right

FLOOR = {"cuda": 0.01, "cpu": 0.05}
YARDSTICKS = ("torch", "transformers")


@dataclass(frozen=True)
class Change:
    """The change of one provider's time in one case."""

    case: str
    provider: str
    before: float
    after: float
    noise: float
    unit: str
    """Unit of `before` and `after`: "ms", or "x torch"."""

    @property
    def change(self) -> float:
        """Relative: 0.1 is 10 % slower."""
        return self.after / self.before - 1

    @property
    def verdict(self) -> str:
        if abs(math.log(self.after / self.before)) <= self.noise:
            return ""
        return "slower" if self.after > self.before else "faster"


def changes(a: dict[str, Any], b: dict[str, Any], providers: tuple[str, ...] = ("phi1",)) -> list[Change]:
    """The change of each provider in each case that both files have with a right result.

    Raises:
        ValueError: the files are of different devices, or have no case in common.
    """
    names = [device_name(content["environment"]) for content in (a, b)]
    if names[0] != names[1]:
        raise ValueError(f"times of different devices say nothing of the code: {names[0]} and {names[1]}")
    before, after = ({record["case"]: record for record in content["cases"]} for content in (a, b))
    common = [case for case in before if case in after]
    if not common:
        raise ValueError("the two files have no case in common")
    kind = a["environment"]["device"]
    found = (_change(case, provider, before[case], after[case], kind) for case in common for provider in providers)
    return [change for change in found if change is not None]


def _change(case: str, provider: str, before: dict[str, Any], after: dict[str, Any], kind: str) -> Change | None:
    entries = [right(record).get(provider) for record in (before, after)]
    if entries[0] is None or entries[1] is None:
        return None
    unit = "ms" if kind == "cuda" else _yardstick(provider, before, after)
    values = [_in_units(record, entry, unit) for record, entry in zip((before, after), entries, strict=True) if entry]
    noise = FLOOR[kind] + sum(max(high - median, median - low) / median for median, low, high in values)
    return Change(case, provider, values[0][0], values[1][0], noise, unit)


def _yardstick(provider: str, *records: dict[str, Any]) -> str:
    """A peer that both records have beside phi1, or the roof."""
    for name in YARDSTICKS:
        if provider == "phi1" and all("ratio" in right(record).get(name, {}) for record in records):
            return f"x {name}"
    return "x roof"


def _in_units(record: dict[str, Any], entry: dict[str, Any], unit: str) -> list[float]:
    if unit == "ms":
        return entry["ms"]
    if unit == "x roof":
        return [ms / record["roof"]["ms"] for ms in entry["ms"]]
    # The file has the peer's time over ours; ours over the peer's is its inverse, low and high changing places.
    median, low, high = right(record)[unit.removeprefix("x ")]["ratio"]
    return [1 / median, 1 / high, 1 / low]


def main(argv: list[str], make_parser: MakeParser) -> int:
    parser = make_parser("phi1 bench compare", "What got faster or slower from results file A to B, beyond noise.")
    parser.add_argument("a", type=path_option, metavar="A", help="results before")
    parser.add_argument("b", type=path_option, metavar="B", help="results after")
    parser.add_argument("--peers", action="store_true", help="also the peers, which should not have moved")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if anything is slower")
    args = parser.parse_args(argv)
    a, b = read(args.a), read(args.b)
    providers = ("phi1",)
    if args.peers:
        providers = tuple(dict.fromkeys(e["provider"] for r in a["cases"] for e in r["providers"]))
    found = changes(a, b, providers)
    print(f"{'case':<80} {'provider':<20} {'A':>10} {'B':>10} {'':<14} {'change':>8} {'noise':>7}")
    for change in found:
        print(f"{change.case:<80} {change.provider:<20} {change.before:>10.4g} {change.after:>10.4g} {change.unit:<14} "
              f"{100 * change.change:>+7.1f}% {100 * change.noise:>6.1f}%  {change.verdict}")
    counts = {verdict: sum(change.verdict == verdict for change in found) for verdict in ("faster", "slower")}
    print(f"{len(found)} compared: {counts['faster']} faster, {counts['slower']} slower, the others within noise")
    return 1 if args.strict and counts["slower"] else 0
