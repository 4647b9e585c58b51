"""`phi1 convert`: a model of any published layout, or a run's checkpoint, in the current Hugging Face layout."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from phi1.arguments import path_option
from phi1.cli.model_options import add_model_options, load_named_tokenizer, locate_model


def main(argv: list[str], parser_class: type) -> int:
    """The command."""
    parser = parser_class("phi1 convert", "Write a model of any published layout, or a training run's checkpoint, in "
                          "the current Hugging Face layout.")
    add_model_options(parser)
    parser.add_argument("--out", type=path_option, required=True, help="the folder to write; new or empty")
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out must be a new or empty folder; {args.out} is not")

    from phi1.train.checkpoint.files import STATE, checkpoints
    from phi1.weights.huggingface import load, save

    given = Path(args.model)
    if (given / STATE).is_file() or (given.name.startswith("step-") and given.parent.is_dir() and not given.exists()):
        return _convert_checkpoint(args)

    if found := checkpoints(given / "checkpoints"):
        raise ValueError(f"--model {args.model} is a run: give one of its checkpoints, such as {found[-1]}, or its "
                         "export")

    folder = locate_model(args)
    tokenizer = None
    if args.tokenizer or any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        tokenizer = load_named_tokenizer(args, folder)
    else:
        print(f"phi1 convert: {folder} has no tokenizer, so {args.out} will have none; "
              "--tokenizer microsoft/phi-1 adds phi-1's", file=sys.stderr)
    model = load(folder, device="cpu", dtype=args.dtype)
    save(model, args.out, tokenizer=tokenizer, replace=False)
    print(f"phi1 convert: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{str(model.embed.weight.dtype).removeprefix('torch.')}, written to {args.out}", file=sys.stderr)
    return 0


def _convert_checkpoint(args: argparse.Namespace) -> int:
    from phi1.train.checkpoint.convert import convert, find_tokenizer
    from phi1.train.metrics.card import model_card
    from phi1.train.runtime.launch import RunError

    checkpoint = Path(args.model)
    if args.tokenizer:
        load_named_tokenizer(args, checkpoint)  # checked before gigabytes are read
    elif find_tokenizer(checkpoint) is None:
        print(f"phi1 convert: the run's tokenizer is not found, so {args.out} will have none; --tokenizer adds one",
              file=sys.stderr)
    try:
        count = convert(checkpoint, args.out, args.tokenizer, args.dtype,
                        lambda config, step: model_card(checkpoint.resolve().parents[1], config, step))
    except RunError as error:
        raise ValueError(str(error)) from error
    print(f"phi1 convert: {count:,} parameters of {checkpoint}, {args.dtype or 'float32'}, written to {args.out}",
          file=sys.stderr)
    return 0
