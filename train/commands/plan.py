"""`phi1 plan`: the memory, time and cost of a recipe on some GPUs."""

from __future__ import annotations

import argparse
from pathlib import Path

from phi1.arguments import path_option
from phi1.gpus import GPUS
from phi1.train.plan.measured import measured_mfu
from phi1.train.plan.plan import ASSUMED_MFU, Cluster, report
from phi1.train.recipe.command_line import parse
from phi1.train.recipe.recipe import Recipe
from phi1.train.runtime.launch import Rank, RunError


def main(argv: list[str], parser_class: type) -> int:
    """Run the command; returns the exit code."""
    parser = parser_class("phi1 plan", "What a run needs: memory of each GPU, time, cost. Nothing is run.\n\n"
                          "Any key of the recipe may follow as --section.key value, as for train/pretrain.py.")
    parser.add_argument("--config", type=path_option, default=Path(__file__).parents[1] / "configs" / "phi1-base.toml",
                        help="the run's recipe; without it phi-1-base's")
    parser.add_argument("--gpu", default="a100-80", choices=list(GPUS), help="%(choices)s (%(default)s)")
    parser.add_argument("--gpus", type=_count, default=8, help="over all nodes (%(default)s)")
    parser.add_argument("--nodes", type=_count, default=1, help="(%(default)s)")
    parser.add_argument("--price", type=_positive, help="of one GPU-hour, in any currency")
    parser.add_argument("--mfu", type=_share, help="model flops utilisation, 0 to 1; without it what bench/results "
                        f"have measured on this GPU, else {ASSUMED_MFU} is assumed")
    options, rest = parser.parse_known_args(argv)
    if options.gpus % options.nodes:
        parser.error(f"--nodes must divide --gpus, {options.gpus}; got {options.nodes}")
    stray = [word for word in rest if word.startswith("--") and "." not in word]
    if stray:
        parser.error(f"unrecognized arguments: {stray[0]}")
    try:
        recipe = parse(["--config", str(options.config), *rest])
        assert recipe is not None
        Rank(0, options.gpus, 0, options.gpus // options.nodes).shard_group(recipe.run.shard_group)
        lines = report(recipe, _cluster(options, recipe))
    except RunError as error:
        parser.error(str(error))
    print("\n".join(lines))
    return 0


def _cluster(options: argparse.Namespace, recipe: Recipe) -> Cluster:
    gpu, given = GPUS[options.gpu], options.mfu and (options.mfu, "given")
    measured = None if recipe.train.precision == "fp32" else measured_mfu(gpu, recipe.train.dropout > 0)
    mfu, source = given or measured or (ASSUMED_MFU, "assumed")
    return Cluster(gpu, options.gpus, options.nodes, options.price, mfu, source)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise ValueError
    return value


_count.__name__, _positive.__name__, _share.__name__ = "count", "number above 0", "share of 1"
