"""`phi1 bench report`: the tables and plots of docs/benchmarks.md, from results files alone.

The text between the page's markers is what this command writes for the files that it links to; a test compares the two.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from phi1.arguments import path_option
from phi1.bench.harness.environment import ROOT, about
from phi1.bench.harness.files import locked, replace
from phi1.bench.harness.parser import MakeParser
from phi1.bench.report.results import FOLDER, FORMAT, gather, read, right
from phi1.bench.report.table import rate, times

BEGIN, END = "<!-- phi1 bench report: begin -->", "<!-- phi1 bench report: end -->"
PAGE = ROOT / "docs" / "benchmarks.md"


def section(paths: list[Path], folder: Path = PAGE.parent) -> str:
    """The text between the markers of a page in `folder`: a table for each results file."""
    return "\n\n".join(_one(path, folder) for path in paths)


def _one(path: Path, folder: Path) -> str:
    content = read(path)
    head = f"{about(content['environment'])}, {content['date']} ([results]({_link(path, folder)})):"
    rows = [row(record) for record in content["cases"] if record["readme"]]
    lines = ["| case | phi1, ms [p20-p80] | rate | of the roof | nearest peer | its time / ours |",
             "|---|---|---|---|---|---|"]
    plots = [f"![{plot.stem.rsplit('-', 1)[-1]}]({_link(plot, folder)})"
             for plot in sorted(path.parent.glob(f"{path.stem}-*.png"))]
    return "\n".join([head, "", *lines, *rows, *(["", *plots] if plots else [])])


def _link(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def row(record: dict[str, Any]) -> str:
    """A case's row of the page's table. A failure is a row too; a result without a reference is marked unchecked."""
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
    peers = [entry for name, entry in right(record).items() if name != "phi1" and "ratio" in entry]
    return min(peers, key=lambda entry: entry["ratio"][0], default=None)


def put(page: str, text: str) -> str:
    """The page with another text between its markers.

    Raises:
        ValueError: it does not have both markers, in this order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END} to write between")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def newest() -> list[Path]:
    """The latest results file of each machine."""
    folders = sorted(folder for folder in FOLDER.iterdir() if folder.is_dir())
    # By stem, since NAME.2.json is newer than NAME.json.
    ordered = (sorted(folder.glob("*.json"), key=lambda path: path.stem) for folder in folders)
    files = ([path for path in paths if f'"format": "{FORMAT}"' in path.read_text()] for paths in ordered)
    return [found[-1] for found in files if found]


def main(argv: list[str], make_parser: MakeParser) -> int:
    parser = make_parser("phi1 bench report", "Write the tables of docs/benchmarks.md, and plots beside the results.")
    parser.add_argument("files", type=path_option, nargs="*", metavar="FILE",
                        help="results files (the newest of each machine in bench/results/). The results in a folder, "
                             "such as OUT of bench/gpu.sh, become one file there, beside the others' newest")
    parser.add_argument("--page", "--readme", type=path_option, default=PAGE, metavar="FILE",
                        help="the file with the markers (docs/benchmarks.md)")
    parser.add_argument("--no-plots", action="store_true", help="write no plots, which need matplotlib")
    parser.add_argument("--print", action="store_true", help="print the tables; write neither the page nor plots")
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
    text = section(paths, args.page.parent)
    if args.print:
        print(text)
        return 0
    with locked(args.page.resolve().parent):
        replace(args.page, put(args.page.read_text(encoding="utf-8"), text))
    for path in [args.page, *images]:
        print(path)
    return 0
