"""The `phi1` command. Each subcommand imports its modules when it runs, so `phi1 --help` is fast.

Text goes to standard output, notes and errors to standard error. An error that the user can cause ends in one line and
exit code 2. Ctrl-C gives exit code 130, a closed output pipe 141.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from phi1 import __version__
from phi1.arguments import one_line

INTERRUPTED, READER_GONE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; for a misspelt option they name the nearest one."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message += _nearest(unknown.split()[0].split("=")[0], list(self._option_string_actions))
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def _nearest(word: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None takes them from the process.

    Returns:
        The exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser("phi1", "phi-1, Microsoft's 1.3 B parameter model of Python code: complete, train, measure.")
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
        import numpy  # noqa: F401  (before PyTorch, which imports it as well, but swallows a Ctrl-C that comes meanwhile)

        outcome.code = COMMANDS[name][0](argv[1:])  # --help and usage errors leave through SystemExit
    return outcome.code


class _Outcome:
    code = 2


@contextlib.contextmanager
def _one_line_errors(prog: str) -> Iterator[_Outcome]:
    """Turn an error that the user can cause into one line and an exit code. Our own mistakes keep their traceback."""
    outcome = _Outcome()
    try:
        yield outcome
        sys.stdout.flush()
    except KeyboardInterrupt:
        outcome.code = INTERRUPTED
    except BrokenPipeError:
        outcome.code = READER_GONE
    except (ValueError, OSError, NotImplementedError, FloatingPointError, MemoryError, RuntimeError) as error:
        # PyTorch reports a lack of memory as a RuntimeError; any other plain RuntimeError is our own mistake.
        if type(error) is RuntimeError and "memory" not in str(error):
            raise
        outcome.code = 2
        print(f"{prog}: error: {_describe(error)}", file=sys.stderr)
    finally:
        _drop_unwritable_output()


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return one_line(error) or type(error).__name__


def _drop_unwritable_output() -> None:
    """Discard output that cannot be written, because Python flushes again at exit and would fail a second time."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _generate(argv: list[str]) -> int:
    from phi1.cli.generate import main as generate

    return generate(argv, Parser)


def _humaneval(argv: list[str]) -> int:
    from phi1.cli.humaneval import main as humaneval

    return humaneval(argv, Parser)


def _convert(argv: list[str]) -> int:
    from phi1.cli.convert import main as convert

    return convert(argv, Parser)


def _push(argv: list[str]) -> int:
    from phi1.cli.push import main as push

    return push(argv, Parser)


def _prepare(argv: list[str]) -> int:
    from phi1.train.commands.prepare import main as prepare

    return prepare(argv) or 0


def _tune(argv: list[str]) -> int:
    from phi1.bench.tune.tune import main as tune

    return tune(argv, Parser)


def _verify(argv: list[str]) -> int:
    from phi1.train.commands.verify import main as verify

    return verify(argv, Parser)


def _ledger(argv: list[str]) -> int:
    from phi1.train.commands.ledger import main as ledger

    return ledger(argv, Parser)


def _plan(argv: list[str]) -> int:
    from phi1.train.commands.plan import main as plan

    return plan(argv, Parser)


def _doctor(argv: list[str]) -> int:
    Parser("phi1 doctor", "Check this machine and installation; exit code 1 if something is broken.").parse_args(argv)
    from phi1.cli.doctor import examine

    failed = False
    for finding in examine():
        print(finding, flush=True)
        failed |= finding.status == "FAIL"
    return 1 if failed else 0


def _bench(argv: list[str]) -> int:
    from phi1.bench.cli import COMMANDS as OF_BENCH
    from phi1.bench.cli import main as bench

    if not (argv and argv[0] in OF_BENCH):
        return bench(argv, Parser)
    with _one_line_errors(f"phi1 bench {argv[0]}") as outcome:
        outcome.code = bench(argv, Parser)
    return outcome.code


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "generate": (_generate, "complete a prompt"),
    "humaneval": (_humaneval, "let a model write HumanEval's functions, and run their tests"),
    "prepare": (_prepare, "turn source files into a corpus to train on"),
    "convert": (_convert, "write a model in the current Hugging Face layout"),
    "push": (_push, "upload an exported model to the Hugging Face Hub"),
    "bench": (_bench, "measure the operations and units beside their peers"),
    "tune": (_tune, "search the kernels' tile shapes on this GPU"),
    "verify": (_verify, "compare checkpoints, runs and corpora with their hashes"),
    "ledger": (_ledger, "sum up a run's ledger, and draw its curves"),
    "plan": (_plan, "say what a run needs: memory of each GPU, time, cost"),
    "doctor": (_doctor, "check this machine and installation"),
}
