"""The command line's parser, and what several commands and scripts of the benchmarks share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

MakeParser = Callable[[str, str], Any]
"""Makes a command's parser from the program's name and its description."""


def plain_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Make the parser of a file that runs without the `phi1` command. Of a file's docstring the first line is shown."""
    return argparse.ArgumentParser(prog=prog, description=(description or "").partition("\n")[0], allow_abbrev=False)


def choose_device(args: argparse.Namespace) -> None:
    """Fill in --device: cuda if there is a device, else cpu."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device on this machine; cpu would do")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def on_a_gpu(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> int:
    """Run a script for a GPU, or with --rehearse on the CPU. What the user can cause is one line and exit code 2.

    Args:
        parser: of the script's other options.
        run: takes the options and returns the exit code.
    """
    import torch

    parser.add_argument("--rehearse", action="store_true", help="with tiny shapes on the CPU")
    options = parser.parse_args()
    try:
        if options.rehearse or torch.cuda.is_available():
            return run(options)
        fault = "there is no CUDA device; --rehearse runs on the CPU"
    except OSError as error:
        fault = f"{error.filename}: {error.strerror}"
    print(f"{parser.prog}: error: {fault}", file=sys.stderr)
    return 2
