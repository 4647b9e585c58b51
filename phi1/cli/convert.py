"""`phi1 convert`: a model, or a run's checkpoint, in the current Hugging Face layout or as a GGUF file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from phi1.arguments import one_line, path_option
from phi1.cli.model_options import add_model_options, load_named_tokenizer, locate_model

if TYPE_CHECKING:
    from phi1.tokenizer import Tokenizer


def main(argv: list[str], parser_class: type) -> int:
    """The command."""
    parser = parser_class("phi1 convert", "Write a model of any published layout, a GGUF file, or a training run's "
                          "checkpoint in the current Hugging Face layout, or as a GGUF file for llama.cpp.")
    add_model_options(parser)
    parser.add_argument("--out", type=path_option, required=True,
                        help="the folder to write, new or empty; with --gguf a new FILE.gguf")
    parser.add_argument("--gguf", choices=("f16", "q8_0"), help="write a GGUF file, with matrices of this type")
    parser.add_argument("--adapter", action="store_true",
                        help="write the adapters of a checkpoint with model.lora_rank, for peft, and not the model")
    args = parser.parse_args(argv)
    if args.adapter and (args.gguf or args.dtype or args.tokenizer):
        raise ValueError("--adapter goes with --model and --out alone")
    _check_out(args)

    from phi1.train.checkpoint.files import STATE, checkpoints

    given = Path(args.model)
    if (given / STATE).is_file() or (given.name.startswith("step-") and given.parent.is_dir() and not given.exists()):
        return _convert_checkpoint(args)

    if args.adapter:
        raise ValueError(f"--adapter needs a run's checkpoint; --model {args.model} is none")
    if found := checkpoints(given / "checkpoints"):
        raise ValueError(f"--model {args.model} is a run: give one of its checkpoints, such as {found[-1]}, or its "
                         "export")
    return _convert_model(args)


def _check_out(args: argparse.Namespace) -> None:
    if args.gguf is None:
        if args.out.suffix == ".gguf":
            raise ValueError(f"--out {args.out}: give --gguf f16 or --gguf q8_0 to write a GGUF file")
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise ValueError(f"--out must be a new or empty folder; {args.out} is not")
        return
    if args.out.suffix != ".gguf" or args.out.exists():
        raise ValueError(f"--out must be a new FILE.gguf with --gguf; got {args.out}")
    if args.dtype:
        raise ValueError(f"--dtype {args.dtype}: --gguf {args.gguf} sets the type already")


def _convert_model(args: argparse.Namespace) -> int:
    from phi1.weights.huggingface import load, save

    folder = locate_model(args)
    tokenizer = None
    files = (folder, folder / "tokenizer.json", folder / "vocab.json")
    if args.tokenizer or any(path.is_file() for path in files):
        tokenizer = load_named_tokenizer(args, folder)
    elif args.gguf is None:
        print(f"phi1 convert: {folder} has no tokenizer, so {args.out} will have none; "
              "--tokenizer microsoft/phi-1 adds phi-1's", file=sys.stderr)
    model = load(folder, device="cpu", dtype=args.dtype)
    if args.gguf is None:
        save(model, args.out, tokenizer=tokenizer, replace=False)
    else:
        _save_gguf(args, model.state_dict(), model.config, tokenizer)
    _report(args, model.config.num_parameters, str(model.embed.weight.dtype).removeprefix("torch."))
    return 0


def _convert_checkpoint(args: argparse.Namespace) -> int:
    from phi1.train.checkpoint.convert import convert, convert_adapter, find_tokenizer, read_weights
    from phi1.train.metrics.card import model_card
    from phi1.train.runtime.launch import RunError

    checkpoint = Path(args.model)
    place = args.tokenizer or find_tokenizer(checkpoint)
    if args.tokenizer:
        load_named_tokenizer(args, checkpoint)  # checked before gigabytes are read
    elif place is not None and not Path(place).resolve().is_relative_to(checkpoint.resolve().parents[1]):
        print(f"phi1 convert: {one_line(f'the tokenizer is {place}, which the config.toml of the run names')}; "
              "--tokenizer gives another", file=sys.stderr)
    elif place is None and not args.gguf and not args.adapter:
        print(f"phi1 convert: the run's tokenizer is not found, so {args.out} will have none; --tokenizer adds one",
              file=sys.stderr)
    try:
        if args.adapter:
            count = convert_adapter(checkpoint, args.out)
        elif args.gguf is None:
            count = convert(checkpoint, args.out, args.tokenizer, args.dtype,
                            lambda config, step: model_card(checkpoint.resolve().parents[1], config, step))
        else:
            from phi1.tokenizer import load_tokenizer

            state, config = read_weights(checkpoint)
            _save_gguf(args, state, config, None if place is None else load_tokenizer(str(place)))
            count = config.num_parameters
    except RunError as error:
        raise ValueError(str(error)) from error
    _report(args, count, args.dtype or "float32")
    return 0


def _save_gguf(args: argparse.Namespace, state: dict, config: object, tokenizer: Tokenizer | None) -> None:
    from phi1.weights.gguf_file import save_gguf

    if tokenizer is None:
        raise ValueError(f"--model {args.model} has no tokenizer, which a GGUF file needs; "
                         "--tokenizer microsoft/phi-1 adds phi-1's")
    save_gguf(state, config, args.out, tokenizer=tokenizer, kind=args.gguf)  # type: ignore[arg-type]


def _report(args: argparse.Namespace, parameters: int, dtype: str) -> None:
    print(f"phi1 convert: {parameters:,} parameters, {args.gguf or dtype}, written to {args.out}", file=sys.stderr)
