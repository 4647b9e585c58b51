"""`phi1 prepare`: documents in, a corpus out."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import NoReturn

from phi1.arguments import name_option, path_option
from phi1.atomic import identity
from phi1.train.prepare.prepare import prepare


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage, and exit."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", action="append", type=name_option, metavar="WHAT",
                        help="stdlib (this Python's standard library, the default), a folder of .py files, a .jsonl "
                        "file, or a Hub dataset OWNER/NAME[:CONFIG]; may be given several times")
    parser.add_argument("--out", type=path_option, required=True, metavar="DIR", help="folder of the corpus")
    parser.add_argument("--tokenizer", default="microsoft/phi-1", type=name_option, metavar="NAME",
                        help="microsoft/phi-1 (default), a folder, a Hub id, or train: a BPE trained on the training "
                        "documents")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="tokens of the trained BPE (default: 4096)")
    parser.add_argument("--val-fraction", type=float, default=0.02, metavar="F", help="share of the documents held out "
                        "(default: %(default)s)")
    parser.add_argument("--column", default="text", metavar="NAME", help="field of a .jsonl file, or column of a Hub "
                        "dataset, with the text (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that tokenise (default: one a "
                        "core); the result does not depend on it")
    parser.add_argument("--force", action="store_true", help="replace the corpus in DIR, whatever it is")


def _run(args: argparse.Namespace) -> int:
    before = identity(args.out)
    try:
        if args.vocab_size is not None and args.tokenizer != "train":
            raise ValueError("--vocab-size goes with --tokenizer train; the given tokenizer has its own size")
        summary = prepare(args.source or ["stdlib"], args.out, tokenizer=args.tokenizer, workers=args.workers,
                          vocab_size=args.vocab_size or 4096, val_fraction=args.val_fraction, force=args.force,
                          column=args.column, report=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        outcome = "nothing was written" if identity(args.out) == before else f"{args.out} is complete"
        print(f"phi1 prepare: stopped; {outcome}", file=sys.stderr)
        return 130
    except (OSError, ValueError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"phi1 prepare: error: {' '.join(reason.split())}", file=sys.stderr)
        return 2
    print(summary)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for an error that the user can mend, 130 if stopped."""
    parser = _Parser(prog="phi1 prepare", description="Make a tokenised corpus for training from documents.")
    _add_arguments(parser)
    args = parser.parse_args(argv)
    # SIGTERM stops it like Ctrl-C, so that it cleans up.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(args)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
