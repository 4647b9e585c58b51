"""What a model under training writes: completions of function headers from the held-out text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import phi1
from phi1 import Phi1
from phi1.tokenizer import Tokenizer
from phi1.train.runtime.all_ranks import Failed, all_ranks, attempt
from phi1.train.runtime.engine import DTYPES, Engine, gather
from phi1.train.runtime.launch import RunError
from phi1.train.step.trainer import Trainer

TEMPERATURE = 0.7
COMPLETION_TOKENS = 80
STOP = ("\ndef ", "\nclass ", "\n@", "\n\n\n")
# A top-level function with arguments, and its docstring if that is one line.
_HEADER = re.compile(r'^def \w+\([^)\n]+\):\n(?: {4}"""[^"\n]{10,70}"""\n)?', re.MULTILINE)


def function_headers(text: bytes, count: int) -> list[str]:
    """Up to `count` different headers from some source text, spread over it; those with a docstring come first."""
    found = list(dict.fromkeys(match[0] for match in _HEADER.finditer(text.decode("utf-8", errors="replace"))))
    documented = [header for header in found if header.count("\n") == 2]
    others = [header for header in found if header.count("\n") == 1]
    chosen = _spread(documented, count)
    return chosen + _spread(others, count - len(chosen))


def _spread(items: list[str], count: int) -> list[str]:
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else items


def complete(model: Phi1, tokenizer: Tokenizer, headers: list[str], seed: int) -> list[str]:
    """Each header with what the model adds to it; the same ones for the same weights and seed."""
    completed = phi1.generate(model, tokenizer, headers, max_new_tokens=COMPLETION_TOKENS, temperature=TEMPERATURE,
                              seed=seed, stop=STOP)
    return [f"{header}{str(text).rstrip()}\n" for header, text in zip(headers, completed, strict=True)]


def whole_model(model: Phi1, engine: Engine, here: bool = True) -> Phi1 | None:
    """Collective: a copy of a sharded model, in the precision of the arithmetic, where `here`; None elsewhere.

    A copy, since processes may use it differently often: the sharded model itself would gather parameters in each pass,
    for which all must call it together, and would have to give them up before the next step.

    Raises:
        Failed: on every process, if one has no memory for it.
    """
    (copy,) = all_ranks(lambda: _empty_copy(model, engine) if here else None, keep=True)
    own = dict(copy.named_parameters()) if copy else {}
    gather(model, lambda name, whole: own[name].copy_(whole) if own else None)
    return copy


def _empty_copy(model: Phi1, engine: Engine) -> Phi1:
    copy = Phi1(model.config, device="meta", dtype=DTYPES[engine.precision]).to_empty(device=engine.device)
    copy.init_tables()
    return copy.eval()


@dataclass(frozen=True)
class Samples:
    """Completions of the same headers again and again, a file each time.

    Args:
        folder: of the files; made when the first is written.
        tokenizer: the corpus's.
        headers: to be completed.
        seed: of the drawing.
    """

    folder: Path
    tokenizer: Tokenizer
    headers: list[str]
    seed: int

    def write(self, trainer: Trainer, rank: int) -> None:
        """Collective: rank 0 completes the headers, if any, with the weights as they are and writes step-N.md.

        Neither the weights nor any random number of the training is touched.

        Raises:
            RunError: on every process, if one has no memory for it; on rank 0 alone, for which no other waits, if the
                model computes nan or the file cannot be written.
        """
        if not self.headers:
            return
        try:
            model = whole_model(trainer.model, trainer.engine, here=rank == 0)
        except Failed as failure:
            error: str | None = str(failure)
        else:
            error, _ = attempt(lambda: self._write(model, trainer.finished) if model else None)
        if error:
            raise RunError(f"the completions of step {trainer.finished} are missing: {error}")

    def _write(self, model: Phi1, step: int) -> None:
        pieces = complete(model, self.tokenizer, self.headers, self.seed)
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"step-{step}.md").write_text(
            f"# Step {step}\n\nTemperature {TEMPERATURE}, seed {self.seed}.\n"
            + "".join(f"\n```python\n{piece}```\n" for piece in pieces), encoding="utf-8")
