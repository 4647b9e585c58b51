"""`phi1 generate`: complete a prompt; the text goes to standard output as it is decoded."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, TextIO

from phi1.arguments import path_option
from phi1.cli.model_options import add_model_options, load_named_tokenizer, locate_model

if TYPE_CHECKING:
    from phi1.generation import Completion


def main(argv: list[str], parser_class: type) -> int:
    """The command."""
    parser = parser_class("phi1 generate", "Complete a prompt; the text goes to standard output as it is decoded.")
    parser.add_argument("--prompt", help="the text to complete")
    parser.add_argument("--prompt-file", type=path_option, help="a file with the text")
    parser.add_argument("stdin", nargs="?", metavar="-", help="take the text from standard input")
    add_model_options(parser)
    parser.add_argument("--device", help="such as cpu or cuda; without it CUDA where there is a device")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="at most this many (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest, above 0 draws")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0 (default) from all")
    parser.add_argument("--top-p", type=float, default=1.0,
                        help="draw from the likeliest tokens that together have this probability; 1 (default) from all")
    parser.add_argument("--seed", type=int, help="of the random numbers; without it a fresh one, which is printed")
    parser.add_argument("--stop", action="append", default=[],
                        help=r"end before this text; may be given again; \n and \t stand for newline and tab")
    parser.add_argument("--echo", action="store_true", help="write the prompt before the completion")
    args = parser.parse_args(argv)
    if args.stdin not in (None, "-"):
        parser.error(f"unexpected {args.stdin!r}; a prompt is given with --prompt, or - for standard input")
    if sum(source is not None for source in (args.prompt, args.prompt_file, args.stdin)) != 1:
        parser.error("give the prompt in one way: --prompt TEXT, --prompt-file FILE, or - for standard input")
    text = _prompt(args)
    _use_utf8(sys.stdout)

    from phi1.generation import stream
    from phi1.sampling import SamplingParams
    from phi1.weights.huggingface import load

    stop = [item.replace(r"\n", "\n").replace(r"\t", "\t") for item in args.stop]
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature,
                               "top_k": args.top_k, "top_p": args.top_p, "stop": stop}
    # Options are checked before gigabytes are read.
    seed = SamplingParams.check("generate", **options, seed=args.seed).seed
    folder = locate_model(args)
    tokenizer = load_named_tokenizer(args, folder)
    model = load(folder, device=args.device, dtype=args.dtype)
    pieces = stream(model, tokenizer, text, seed=seed, **options)
    if seed is not None:
        print(f"phi1 generate: seed {seed}", file=sys.stderr)
    if args.echo:
        sys.stdout.write(text)
    began = time.perf_counter()
    completion = _write(pieces)
    seconds, count = time.perf_counter() - began, len(completion.token_ids)
    print(f"phi1 generate: {count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s, ended by "
          f"{completion.finish_reason}", file=sys.stderr)
    return 0


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return args.prompt
    name = "standard input" if args.stdin else args.prompt_file
    raw = sys.stdin.buffer.read() if args.stdin else args.prompt_file.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _use_utf8(stream: TextIO) -> None:
    """Write UTF-8 to pipes and files in any locale; a terminal of another encoding gets the characters it can show."""
    if stream.isatty():
        stream.reconfigure(errors="replace")  # type: ignore[attr-defined]
    else:
        stream.reconfigure(encoding="utf-8")  # type: ignore[attr-defined]


def _write(pieces: Generator[str, None, Completion]) -> Completion:
    """Write each piece at once and return the generator's completion. On a terminal, end the last line in any case."""
    try:
        while True:
            sys.stdout.write(next(pieces))
            sys.stdout.flush()
    except StopIteration as end:
        return end.value
    finally:
        if sys.stdout.isatty():
            sys.stdout.write("\n")
