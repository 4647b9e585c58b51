"""`phi1 bench report`: the README's tables and the plots, from results files alone.

The README names the file that its numbers come from, and what stands between its markers is what this writes for that
file: a test compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi1.bench.harness.environment import ROOT
from phi1.bench.harness.files import locked, replace
from phi1.bench.harness.parser import MakeParser
from phi1.bench.report.results import FOLDER, FORMAT, gather, read
from phi1.bench.report.table import rate, times

BEGIN, END = "<!-- phi1 bench report: begin -->", "<!-- phi1 bench report: end -->"
README = ROOT / "README.md"


def section(paths: list[Path], root: Path = ROOT) -> str:
    """What stands between the README's markers: a table for each results file."""
    return "\n\n".join(_one(path, root) for path in paths)


def _one(path: Path, root: Path) -> str:
    content = read(path)
    facts = content["environment"]
    where = facts["gpu"] if facts["device"] == "cuda" else \
        f"{facts['cpu']}, {facts['cores']} cores, PyTorch threads: {facts['threads']}"
    driver = f", driver {facts['driver']}" if "driver" in facts else ""
    link = path.resolve().relative_to(root)
    head = (f"{where}{driver}, torch {facts['torch']}, Triton {facts['triton']}, commit {facts['commit']}, "
            f"{content['date']} ([results]({link.as_posix()})):")
    rows = [row(record) for record in content["cases"] if record["readme"]]
    lines = ["| case | phi1, ms [p20-p80] | rate | of the roof | nearest peer | its time / ours |",
             "|---|---|---|---|---|---|"]
    plots = [f"![{plot.stem.rsplit('-', 1)[-1]}]({plot.resolve().relative_to(root).as_posix()})"
             for plot in sorted(path.parent.glob(f"{path.stem}-*.png"))]
    return "\n".join([head, "", *lines, *rows, *(["", *plots] if plots else [])])


def row(record: dict[str, Any]) -> str:
    """A case's row of the README table; a failure is a row as well, and what nothing was compared with says so."""
    ours, best = record["providers"][0], best_peer(record)
    if ours["status"] != "ok":
        return f"| {record['case']} | {ours['status']} | - | - | - | - |"
    case = record["case"] if "error" in ours else f"{record['case']} (unchecked)"
    peer, ratio = "-", "-"
    if best is not None:
        middle, least, most = best["ratio"]
        peer, ratio = best["provider"], f"{middle:.2f} [{least:.2f}-{most:.2f}]"
    return (f"| {case} | {times(ours)} | {rate(record, ours['ms'][0])} | "
            f"{100 * ours['roof_share']:.0f} % | {peer} | {ratio} |")


def best_peer(record: dict[str, Any]) -> dict[str, Any] | None:
    """The fastest peer that computed the right thing."""
    peers = [entry for entry in record["providers"][1:] if entry["status"] == "ok" and "ratio" in entry]
    return min(peers, key=lambda entry: entry["ratio"][0], default=None)


def put(readme: str, text: str) -> str:
    """The README with another text between its markers.

    Raises:
        ValueError: it has not both markers, in this order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no lines {BEGIN} and {END} to write between")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def newest() -> list[Path]:
    """The latest results file of each machine."""
    folders = sorted(folder for folder in FOLDER.iterdir() if folder.is_dir())
    # By stem, since NAME.2.json is newer than NAME.json.
    ordered = (sorted(folder.glob("*.json"), key=lambda path: path.stem) for folder in folders)
    files = ([path for path in paths if f'"format": "{FORMAT}"' in path.read_text()] for paths in ordered)
    return [found[-1] for found in files if found]


def main(argv: list[str], make_parser: MakeParser) -> int:
    parser = make_parser("phi1 bench report", "Write the README's benchmark tables, and plots beside the results.")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE",
                        help="results files; without any the newest of each machine in bench/results/. Those in a "
                             "folder, as OUT of bench/gpu.sh, become one file there, beside the others' newest")
    parser.add_argument("--readme", type=Path, default=README, help="the file with the markers (the repository's)")
    parser.add_argument("--no-plots", action="store_true", help="write no plots, which need matplotlib")
    parser.add_argument("--print", action="store_true", help="print the tables; write neither the README nor plots")
    args = parser.parse_args(argv)
    gathered = [gather(path) for path in args.files if path.is_dir()]
    others = [path for path in newest() if path.parent not in {new.parent for new in gathered}]
    paths = ([path for path in args.files if not path.is_dir()] or others) + gathered
    if not paths:
        raise ValueError(f"there are no results in {FOLDER}; `phi1 bench --save` writes some")
    images: list[Path] = []
    if not (args.print or args.no_plots):
        from phi1.bench.report.plots import draw, require_matplotlib

        require_matplotlib()
        images = [image for path in paths for image in draw(path)]  # first, since the tables show what is there
    try:
        text = section(paths, args.readme.resolve().parent)
    except ValueError as error:
        if "is not in the subpath" in str(error):
            raise ValueError(f"results that {args.readme} names must lie in its folder") from error
        raise
    if args.print:
        print(text)
        return 0
    with locked(args.readme.resolve().parent):
        replace(args.readme, put(args.readme.read_text(encoding="utf-8"), text))
    for path in [args.readme, *images]:
        print(path)
    return 0
