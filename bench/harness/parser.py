"""The command line's parser and the options that several commands of `phi1 bench` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

MakeParser = Callable[[str, str], Any]
"""Makes a command's parser from the program's name and its description."""


def plain_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Make the parser of a file that runs without the `phi1` command."""
    return argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)


def choose_device(args: argparse.Namespace) -> None:
    """Fill in --device: cuda if there is a device, else cpu."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device on this machine; cpu would do")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
