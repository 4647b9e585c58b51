"""The `phi1` command. Each subcommand imports what it needs when it runs, so that help comes at once.

Text goes to standard output, notes and errors to standard error. Whatever the user can cause ends in one line and
exit code 2, Ctrl-C in 130, a reader that has gone away in 141.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from phi1 import __version__

if TYPE_CHECKING:
    from phi1.generation import Completion

INTERRUPTED, READER_GONE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, with the nearest option where one is misspelt."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message += _nearest(unknown.split()[0].split("=")[0], list(self._option_string_actions))
        self.exit(2, f"{self.prog}: error: {message}\n")


def _nearest(word: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def main(argv: list[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: arguments after the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser("phi1", "phi-1, Microsoft's 1.3 B parameter model of Python code: complete, prepare, convert.")
    parser.add_argument("--version", action="version", version=f"phi1 {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.usage = "phi1 COMMAND [OPTIONS]"
    summaries = "\n".join(f"  {name:<10} {summary}" for name, (_, summary) in COMMANDS.items())
    parser.epilog = f"commands:\n{summaries}\n\n`phi1 COMMAND --help` says what each takes."
    names = ", ".join(COMMANDS)
    if not argv:
        parser.error(f"give a command: {names}")
    name = argv[0]
    if name not in COMMANDS and not name.startswith("-"):
        parser.error(f"there is no command {name!r}" + (_nearest(name, list(COMMANDS)) or f"; there are {names}"))
    if name not in COMMANDS:
        parser.parse_args(argv)  # --help, --version, or an option in a command's place
    with _one_line_errors(f"phi1 {name}") as outcome:
        outcome.code = COMMANDS[name][0](argv[1:])  # --help and usage errors leave through SystemExit
    return outcome.code


class _Outcome:
    code = 2


@contextlib.contextmanager
def _one_line_errors(prog: str) -> Iterator[_Outcome]:
    """Turn what the user can cause into one line and an exit code; our own mistakes keep their traceback."""
    outcome = _Outcome()
    try:
        yield outcome
        sys.stdout.flush()
    except KeyboardInterrupt:
        outcome.code = INTERRUPTED
    except BrokenPipeError:
        outcome.code = READER_GONE
    except (ValueError, OSError, NotImplementedError, FloatingPointError, MemoryError, RuntimeError) as error:
        # Running out of memory is a RuntimeError to PyTorch; any other plain RuntimeError is a mistake of ours.
        if type(error) is RuntimeError and "memory" not in str(error):
            raise
        outcome.code = 2
        print(f"{prog}: error: {_describe(error)}", file=sys.stderr)
    finally:
        _drop_unwritable_output()


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _drop_unwritable_output() -> None:
    """Python flushes at exit as well; what could not be written must not fail there a second time."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _generate(argv: list[str]) -> int:
    parser = Parser("phi1 generate", "Complete a prompt; the text goes to standard output as it is decoded.")
    parser.add_argument("--prompt", help="the text to complete")
    parser.add_argument("--prompt-file", type=Path, help="a file with the text")
    parser.add_argument("stdin", nargs="?", metavar="-", help="take the text from standard input")
    _add_model_options(parser)
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

    from phi1._sampling import Rules
    from phi1.generation import stream
    from phi1.tokenizer import BUILT_IN, load_tokenizer
    from phi1.weights import load

    stop = [item.replace(r"\n", "\n").replace(r"\t", "\t") for item in args.stop]
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "temperature": args.temperature,
                               "top_k": args.top_k, "top_p": args.top_p, "stop": stop}
    # Checked before gigabytes are read.
    seed = Rules.check("generate", **options, seed=args.seed).seed
    folder = _locate_model(args)
    tokenizer = load_tokenizer(args.tokenizer or (args.model if args.model in BUILT_IN else folder))
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


def _add_model_options(parser: Parser) -> None:
    parser.add_argument("--model", required=True, help="a folder, or a Hugging Face Hub id such as microsoft/phi-1")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--tokenizer", help="a folder or Hub id; without it the model's own")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="without it the file's")


def _locate_model(args: argparse.Namespace) -> Path:
    """The model's folder, downloaded if need be; what is wrong is said of --model."""
    from phi1._checkpoint import locate

    try:
        return locate(args.model, args.revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--model: {str(error).removeprefix('load: ')}") from error


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
    """Pipes and files get UTF-8 whatever the locale; a terminal of another encoding gets what it can show."""
    if stream.isatty():
        stream.reconfigure(errors="replace")  # type: ignore[attr-defined]
    else:
        stream.reconfigure(encoding="utf-8")  # type: ignore[attr-defined]


def _write(pieces: Generator[str, None, Completion]) -> Completion:
    """Write pieces as they come; returns what the generator returns. A terminal's last line is ended in any case."""
    try:
        while True:
            sys.stdout.write(next(pieces))
            sys.stdout.flush()
    except StopIteration as end:
        return end.value
    finally:
        if sys.stdout.isatty():
            sys.stdout.write("\n")


def _convert(argv: list[str]) -> int:
    parser = Parser("phi1 convert", "Write a model of any published layout, or a training run's checkpoint, in the "
                    "current Hugging Face layout.")
    _add_model_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; new or empty")
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out must be a new or empty folder; {args.out} is not")
    if (Path(args.model) / "trainer.json").is_file():
        return _convert_checkpoint(args)

    from phi1.tokenizer import load_tokenizer
    from phi1.weights import load, save

    folder = _locate_model(args)
    tokenizer = None
    if args.tokenizer or any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        tokenizer = load_tokenizer(args.tokenizer or folder)
    else:
        print(f"phi1 convert: {folder} has no tokenizer, so {args.out} will have none; "
              "--tokenizer microsoft/phi-1 adds phi-1's", file=sys.stderr)
    model = load(folder, device="cpu", dtype=args.dtype)
    save(model, args.out, tokenizer=tokenizer)
    print(f"phi1 convert: {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{str(model.embed.weight.dtype).removeprefix('torch.')}, written to {args.out}", file=sys.stderr)
    return 0


def _convert_checkpoint(args: argparse.Namespace) -> int:
    from phi1.train.convert import convert, find_tokenizer
    from phi1.train.launch import RunError

    checkpoint = Path(args.model)
    if args.tokenizer is None and find_tokenizer(checkpoint) is None:
        print(f"phi1 convert: the run's tokenizer is not found, so {args.out} will have none; --tokenizer adds one",
              file=sys.stderr)
    try:
        count = convert(checkpoint, args.out, args.tokenizer, args.dtype)
    except RunError as error:
        raise ValueError(str(error)) from error
    print(f"phi1 convert: {count:,} parameters of {checkpoint}, {args.dtype or 'float32'}, written to {args.out}",
          file=sys.stderr)
    return 0


def _prepare(argv: list[str]) -> int:
    from phi1.train.prepare import main as prepare

    return prepare(argv) or 0


def _tune(argv: list[str]) -> int:
    from phi1.bench.tune import main as tune

    return tune(argv, Parser)


def _verify(argv: list[str]) -> int:
    from phi1.train.verify import main as verify

    return verify(argv, Parser)


def _ledger(argv: list[str]) -> int:
    from phi1.train.ledger_report import main as ledger

    return ledger(argv, Parser)


def _plan(argv: list[str]) -> int:
    from phi1.train.plan import main as plan

    return plan(argv, Parser)


def _doctor(argv: list[str]) -> int:
    Parser("phi1 doctor", "Check this machine and installation; exit code 1 if something is broken.").parse_args(argv)
    from phi1._doctor import examine

    failed = False
    for finding in examine():
        print(finding, flush=True)
        failed |= finding.status == "FAIL"
    return 1 if failed else 0


def _bench(argv: list[str]) -> int:
    from phi1.bench.command import main as bench

    return bench(argv, Parser)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "generate": (_generate, "complete a prompt"),
    "prepare": (_prepare, "turn source files into a corpus to train on"),
    "convert": (_convert, "write a model in the current Hugging Face layout"),
    "bench": (_bench, "measure the operations and units beside their peers"),
    "tune": (_tune, "search the kernels' tile shapes on this GPU"),
    "verify": (_verify, "compare checkpoints, runs and corpora with their hashes"),
    "ledger": (_ledger, "sum up a run's ledger, and draw its curves"),
    "plan": (_plan, "say what a run needs: memory of each GPU, time, cost"),
    "doctor": (_doctor, "check this machine and installation"),
}
