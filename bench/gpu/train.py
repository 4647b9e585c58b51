"""Train the full phi-1 in fp16 with the trainer's own step: the largest micro-batch, then tokens/s, MFU and the loss.

    python bench/gpu_train.py search --out DIR      micro-batches of growing size until the memory is full
    python bench/gpu_train.py run --out DIR         50 or more steps at the fastest of them that fits

A process that has run out of memory is not used again: `run` tries each size in one of its own (`attempt`). The text is
this Python's standard library, tokenised in memory. Each size and each step is a line in DIR as soon as it is done:
peak_gib is all that tensors held, activation_peak_gib what a sequence of the micro-batch took of it at most, beyond
parameters, gradients and optimizer. --rehearse takes a tiny model on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from phi1 import Phi1, Phi1Config, preset
from phi1.bench.gpu.code_corpus import read_code
from phi1.bench.gpu.step_memory import StepMemory
from phi1.bench.harness import files
from phi1.bench.harness.environment import environment
from phi1.gpus import gpu_named
from phi1.train.data.batch_plan import BatchPlan
from phi1.train.recipe.recipe import Train
from phi1.train.runtime import engine
from phi1.train.runtime.launch import Rank, connect, leave
from phi1.train.step.trainer import Trainer

SEARCHED, RUN, RESULT = "micro_batches.jsonl", "steps.jsonl", "train.json"
# From the second micro-step on gradients add up in a buffer of their own, 5.3 GiB: the sizes are tried with it.
SEARCH_MICRO_STEPS = 2
STEP_SECONDS = 2.5  # of one optimizer step: the micro-batches of a step are as many as fit
DROPOUT_STEPS = 3
TEXT_BYTES = 32 << 20  # more than the steps of a run read
OUT_OF_MEMORY = 12
"""Exit code of an attempt that a smaller micro-batch may follow."""


@dataclass(frozen=True)
class Size:
    """What is trained."""

    config: Phi1Config
    tokens: int
    micro_batches: tuple[int, ...]
    steps: int
    source: str
    tokenizer: str
    device: str


FULL = Size(preset("phi1"), 2048, (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32), 60, "stdlib", "microsoft/phi-1",
            "cuda")
TINY = Size(preset("nano", vocab_size=512, hidden_size=64, intermediate_size=256, num_attention_heads=1,
                   num_hidden_layers=2), 32, (1, 2), 8, str(Path(json.__file__).parent), "train", "cpu")


class Training:
    """The model, its trainer and the text. Micro-batch and batch may change from step to step.

    Args:
        size: what is trained.
    """

    def __init__(self, size: Size) -> None:
        rank = Rank()
        self.size = size
        self.machine = engine.start(rank, size.device, "fp16", 0)
        engine.connect_processes(self.machine, rank, connect(rank))
        corpus: Any = read_code(size.source, size.tokenizer, TEXT_BYTES)
        print(f"{corpus.tokens.size:,} tokens of {corpus.folder}", flush=True)
        self.model: Phi1 = engine.build_model(size.config, self.machine, seed=1)
        # A batch is far smaller than phi-1's 1024 sequences, and so is the rate.
        train = replace(Train(), batch_size=1, lr=3e-4, warmup_steps=size.steps // 3, steps=size.steps,
                        loss_scale_window=200)
        self.trainer = Trainer(self.model, train, size.tokens, corpus, BatchPlan.of(1, 1, 0, 1), self.machine)
        self.micro_batch = 1
        self.memory = StepMemory(self.model) if self.machine.device.type == "cuda" else None

    def set_batch(self, micro_batch: int, micro_steps: int) -> None:
        """From the next step on."""
        self.micro_batch = micro_batch
        self.trainer.set_batch(micro_batch * micro_steps, micro_batch)

    def set_dropout(self, p: float) -> None:
        """From the next step on."""
        config = replace(self.size.config, attention_dropout=p, residual_dropout=p)
        for block in self.model.blocks:
            block.config = config  # type: ignore[assignment]

    def step(self) -> dict[str, Any]:
        """One optimizer step, its time and its memory, which is 0 on a CPU."""
        begin = time.perf_counter()
        outcome = self.trainer.run_step()
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        tokens = self.trainer.train.batch_size * self.size.tokens
        activations = self.memory.activations / self.micro_batch if self.memory else 0
        return {"step": outcome.step, "loss": outcome.loss, "norm": outcome.norm, "scale": outcome.scale,
                "skipped": outcome.skipped, "seconds": round(seconds, 4), "tokens_per_s": round(tokens / seconds),
                "activation_peak_gib": round(activations / 2**30, 3)}

    def peak_gib(self) -> float:
        """Most memory that tensors have held since the last call, GiB; 0 on a CPU."""
        return round(self.memory.take_peak() / 2**30, 2) if self.memory else 0.0


def search(size: Size, out: Path, end: float) -> int:
    """Time micro-batches one after another, until one does not fit or the time is up."""
    (out / SEARCHED).unlink(missing_ok=True)
    training = Training(size)
    for micro_batch in size.micro_batches:
        if time.monotonic() > end:
            break
        training.set_batch(micro_batch, SEARCH_MICRO_STEPS)
        try:
            training.step()
            training.peak_gib()
            steps = [training.step() for _ in range(2)]
        except torch.OutOfMemoryError:
            files.append(out / SEARCHED, {"micro_batch": micro_batch, "error": "out of memory"})
            print(f"micro-batch {micro_batch:3}: out of memory", flush=True)
            break
        seconds = statistics.median(step["seconds"] for step in steps) / SEARCH_MICRO_STEPS
        line = {"micro_batch": micro_batch, "seconds": round(seconds, 4), "peak_gib": training.peak_gib(),
                "activation_peak_gib": steps[-1]["activation_peak_gib"],
                "tokens_per_s": round(micro_batch * size.tokens / seconds)}
        files.append(out / SEARCHED, line)
        print(f"micro-batch {micro_batch:3}: {line['tokens_per_s']:,} tokens/s with an optimizer step every "
              f"{SEARCH_MICRO_STEPS}, {line['peak_gib']} GiB, activations {line['activation_peak_gib']} GiB a sequence",
              flush=True)
    return 0


def fastest(searched: Path) -> dict[str, Any] | None:
    """The fastest micro-batch that was timed and is smaller than all that have run out of memory; None if none is."""
    tried = list(files.lines(searched))
    limit = min((line["micro_batch"] for line in tried if "error" in line), default=math.inf)
    timed = [line for line in tried if "seconds" in line and line["micro_batch"] < limit]
    return max(timed, key=lambda line: line["tokens_per_s"], default=None)


def run(options: argparse.Namespace, end: float) -> int:
    """Attempts, each in a process of its own, until a micro-batch fits."""
    code = OUT_OF_MEMORY
    while code == OUT_OF_MEMORY:
        minutes = max(0.0, end - time.monotonic()) / 60
        words = ["--out", options.out, "--minutes", minutes]
        code = subprocess.run([sys.executable, __file__, "attempt", *map(str, words),
                               *(["--rehearse"] if options.rehearse else [])]).returncode
    return code


def attempt(size: Size, out: Path, end: float) -> int:
    """Steps at the fastest micro-batch, then a few with phi-1's dropout. 1 if the loss has not fallen."""
    best = fastest(out / SEARCHED)
    if best is None:
        print("gpu_train: error: no micro-batch was timed that fits; run `search` first", file=sys.stderr)
        return 2
    micro_steps = max(2, min(64, int(STEP_SECONDS / best["seconds"]))) if size is FULL else 2
    training = Training(size)
    training.set_batch(best["micro_batch"], micro_steps)
    for of_another in (RUN, RESULT):
        (out / of_another).unlink(missing_ok=True)
    steps: list[dict[str, Any]] = []
    peak = 0.0
    while not steps or (len(steps) < size.steps and time.monotonic() < end):
        try:
            steps.append(training.step())
        except torch.OutOfMemoryError:
            error = f"out of memory at {micro_steps} a step, after {len(steps)} steps"
            files.append(out / SEARCHED, {"micro_batch": best["micro_batch"], "error": error})
            print(f"micro-batch {best['micro_batch']:3}: out of memory; a smaller one follows", flush=True)
            return OUT_OF_MEMORY
        files.append(out / RUN, steps[-1])
        if len(steps) % 5 == 0:
            peak = max(peak, training.peak_gib())
            _write(size, out, best, micro_steps, steps, peak, [])
            last = steps[-1]
            print(f"step {len(steps)}: loss {last['loss']:.3f}, {last['tokens_per_s']:,} tokens/s", flush=True)
    peak = max(peak, training.peak_gib())
    _write(size, out, best, micro_steps, steps, peak, [])
    training.set_dropout(0.1)
    dropped: list[dict[str, Any]] = []
    with contextlib.suppress(torch.OutOfMemoryError):
        dropped += [training.step() for _ in range(DROPOUT_STEPS)]
    result = _write(size, out, best, micro_steps, steps, peak, dropped)
    _print(result)
    return 0 if result["loss_last"] < result["loss_first"] else 1


def _write(size: Size, out: Path, best: dict[str, Any], micro_steps: int, steps: list[dict[str, Any]], peak: float,
           dropped: list[dict[str, Any]]) -> dict[str, Any]:
    """The result so far."""
    facts = environment(size.device)
    # The first steps compile kernels and fill the allocator.
    speed = statistics.median(step["tokens_per_s"] for step in (steps[2:] or steps))
    gpu = gpu_named(facts.get("gpu", ""))
    flops = {"without attention": size.config.flops_per_token(0),
             "with attention": size.config.flops_per_token(size.tokens),
             "causal": size.config.flops_per_token(size.tokens, causal=True)}
    ends = max(1, len(steps) // 8)
    result = {
        "environment": facts, "tokens": size.tokens, "micro_batch": best["micro_batch"], "micro_steps": micro_steps,
        "steps": len(steps), "skipped": sum(step["skipped"] for step in steps), "peak_gib": peak,
        "activation_peak_gib": steps[-1]["activation_peak_gib"], "tokens_per_s": speed, "flops_per_token": flops,
        "mfu": {name: round(speed * n / gpu.half_tflops / 1e12, 4) for name, n in flops.items()} if gpu else None,
        "loss_first": statistics.mean(step["loss"] for step in steps[:ends]),
        "loss_last": statistics.mean(step["loss"] for step in steps[-ends:]),
    }
    if dropped:
        result["tokens_per_s_dropout_0.1"] = max(step["tokens_per_s"] for step in dropped)
        result["activation_peak_gib_dropout_0.1"] = dropped[-1]["activation_peak_gib"]
    files.replace(out / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _print(result: dict[str, Any]) -> None:
    mfu = result["mfu"] or {}
    dropped = result.get("tokens_per_s_dropout_0.1")
    print(f"""micro-batch      {result['micro_batch']} x {result['tokens']} tokens, {result['micro_steps']} a step
tokens/s         {result['tokens_per_s']:,.0f} (median of {result['steps']} steps, {result['skipped']} skipped); \
with dropout 0.1 {f'{dropped:,.0f}' if dropped else 'out of memory'}""")
    for name, share in mfu.items():
        print(f"MFU {name:18} {100 * share:.1f} %")
    if not mfu:
        print("MFU              unknown: the peak of this device is not listed in phi1/gpus.py")
    print(f"peak memory      {result['peak_gib']} GiB, activations {result['activation_peak_gib']} GiB a sequence\n"
          f"loss             {result['loss_first']:.3f} -> {result['loss_last']:.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("part", choices=("search", "run", "attempt"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0, help="begin no step after this long (%(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    size = TINY if options.rehearse else FULL
    if size.device == "cuda" and not torch.cuda.is_available():
        print("gpu_train: error: there is no CUDA device; --rehearse trains a tiny model on the CPU", file=sys.stderr)
        return 2
    if options.part == "run":
        return run(options, end)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing is forked behind it, and one core would take minutes
    code = {"search": search, "attempt": attempt}[options.part](size, options.out, end)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    leave(main())
