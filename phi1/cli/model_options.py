"""Options of the commands that read a model, and errors that name these options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from phi1.arguments import name_option

if TYPE_CHECKING:
    from phi1.tokenizer import Tokenizer


def add_model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--model", type=name_option, required=required,
                        help="a folder, or a Hugging Face Hub id such as microsoft/phi-1")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--tokenizer", type=name_option, help="a folder or Hub id; without it the model's own")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="without it the file's")


def locate_model(args: argparse.Namespace) -> Path:
    """Return the model's folder, downloaded if needed; errors name --model."""
    from phi1.weights.files import locate

    try:
        return locate(args.model, args.revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--model: {str(error).removeprefix('load: ')}") from error


def load_named_tokenizer(args: argparse.Namespace, folder: Path) -> Tokenizer:
    """Return the tokenizer that --tokenizer names, or by default the one of the model in `folder`."""
    from phi1.tokenizer import BUILT_IN, load_tokenizer

    name = args.tokenizer or (args.model if args.model in BUILT_IN else folder)
    try:
        return load_tokenizer(name)
    except ValueError as error:
        option = "--tokenizer" if args.tokenizer else "--model"
        reason = str(error).removeprefix("load_tokenizer: ").removeprefix("name_or_folder ")
        raise ValueError(f"{option}: {reason}") from error
