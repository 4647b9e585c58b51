"""The results of a finished run: the Hugging Face export, a few completions, and the summary."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import phi1
from phi1.config import Phi1Config
from phi1.tokenizer import Tokenizer
from phi1.train.metrics.progress import duration
from phi1.train.run.folder import RunFolder
from phi1.train.runtime.launch import Rank, RunError, say

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Reached:
    """The figures of a finished run."""

    steps: int
    loss: float
    """Validation, nats per token."""
    bits_per_byte: float
    xz_bits_per_byte: float | None
    """None if there was too little memory for xz."""
    held_out_bytes: int
    tokens: int
    """Number of training tokens, over the whole run."""
    tokens_per_s: float
    """Mean speed since the last start; 0 if that made no step."""
    seconds: float
    skipped: int
    solved: float | None = None
    """HumanEval's pass@1, if it was requested."""


def export(weights: Mapping[str, Tensor], config: Phi1Config, tokenizer: Tokenizer, folder: RunFolder,
           step: int) -> None:
    """Write the model of a step for `phi1.load` and transformers, in fp32, as it was trained, with its model card.

    Raises:
        RunError: it could not be written; the checkpoint is intact.
    """
    from phi1.train.metrics.card import model_card
    from phi1.weights.huggingface import save_state_dict

    try:
        card = model_card(folder.path, config, step)
        save_state_dict(weights, config, folder.export, tokenizer=tokenizer, card=card)
    except Exception as error:
        if not isinstance(error, OSError | ValueError) and not _lacks_memory(error):
            raise
        what = str(error) or "not enough memory"
        raise RunError(f"{folder.export}: {what}; the same command goes on from the newest checkpoint") from None


def show_completions(folder: RunFolder, headers: list[str], seed: int) -> None:
    """Print the exported model's completions of some function headers."""
    from phi1.train.evaluate.samples import TEMPERATURE, complete  # imports torch, which a complete run does not need

    if not headers:
        return
    try:
        model = phi1.load(folder.export, device="cpu")
        completions = "\n".join(complete(model, phi1.load_tokenizer(folder.export), headers, seed))
    except Exception as error:
        if not _lacks_memory(error):
            raise
        completions = "not made, for want of memory\n"
    say(f"\nCompletions of held-out function headers, temperature {TEMPERATURE}, seed {seed}:\n\n{completions}")


def _lacks_memory(error: Exception) -> bool:
    from phi1.train.plan.out_of_memory import is_shortage  # imports torch as well

    return is_shortage(error)


def write_summary(reached: Reached, folder: RunFolder) -> None:
    """Write summary.json. It follows the export, so its presence marks the run as complete."""
    try:
        folder.summary.write_text(json.dumps(vars(reached), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{folder.summary}: {error.strerror}") from None


def show_summary(reached: Reached, folder: RunFolder, headers: list[str]) -> None:
    """Print the results, their files, and the next command."""
    skipped = f", {reached.skipped:,} of them skipped" if reached.skipped else ""
    speed = f", {reached.tokens_per_s:,.0f} tokens/s" if reached.tokens_per_s else ""
    solved = "" if reached.solved is None else f"HumanEval        pass@1 {100 * reached.solved:.1f} %\n"
    prompt = headers[0].split("\n")[0] if headers else "def "
    say(f"""trained          {reached.steps:,} steps{skipped}, {reached.tokens:,} tokens{speed}, \
{duration(reached.seconds)}
validation loss  {reached.loss:.4f} nats a token
bits per byte    {reached.bits_per_byte:.4f} on {reached.held_out_bytes:,} held-out bytes; xz -9 on the same bytes \
{_beside_xz(reached.bits_per_byte, reached.xz_bits_per_byte)}
{solved}Hugging Face     {folder.export}
checkpoints      {folder.checkpoints}
every step       {folder.ledger}
next             phi1 generate --model {shlex.quote(str(folder.export))} --prompt {shlex.quote(prompt)}""")


def _beside_xz(bits: float, xz: float | None) -> str:
    if xz is None:
        return "not known, for want of memory"
    return f"{xz:.4f}: {'the model wins' if bits < xz else 'xz wins'}"


def show_complete(summary: dict[str, Any], folder: RunFolder, rank: Rank) -> None:
    """Print that the run is complete, and commands that may follow."""
    config = shlex.quote(str(folder.config))
    say(f"""{folder.path} is complete: {summary['steps']:,} steps, validation loss {summary['loss']:.4f}, \
{summary['bits_per_byte']:.4f} bits per byte (xz -9 \
{_beside_xz(summary['bits_per_byte'], summary['xz_bits_per_byte'])})
train on         {rank.command(f"--config {config} --train.steps {2 * summary['steps']}")}
start another    {rank.command(f"--config {config} --train.seed 2 --run.folder {shlex.quote(f'{folder.path}-2')}")}
complete code    phi1 generate --model {shlex.quote(str(folder.export))} --prompt 'def '""")
