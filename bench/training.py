"""One optimizer step on random tokens, as phi1's trainer takes it and as transformers' users write it.

Both compute the same: gradients of the mean cross-entropy, global-norm clipping at 1, an AdamW update of float32 master
weights. phi1 runs its trainer: on a GPU FSDP2 at one process, on a CPU 16-bit copies of the weights. transformers runs
under autocast with a loss scaler, its usual way, in bfloat16 on a CPU and in float16 on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from phi1.config import Phi1Config

Step = Callable[[], float]
"""Takes a step; returns its loss."""


@dataclass(frozen=True)
class Plan:
    """What a step works on.

    Args:
        config: the model's shape; its dropout counts.
        batch: sequences.
        tokens: of each.
        device: "cpu" or "cuda".
        precision: "bf16" or "fp16".
        micro_batch: sequences at a time; 0 for all.
    """

    config: Phi1Config
    batch: int
    tokens: int
    device: str = "cpu"
    precision: str = "bf16"
    micro_batch: int = 0


@dataclass
class RandomCorpus:
    """Uniform random tokens in the trainer's corpus interface: speed does not depend on what they say."""

    vocab_size: int
    fingerprint: str = "random"

    def n_samples(self, seq_len: int) -> int:
        return 1 << 20

    def rows(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        return np.random.default_rng(int(indices[0])).integers(self.vocab_size, size=(len(indices), seq_len + 1))


def phi1_step(plan: Plan) -> Step:
    """The trainer's own step."""
    import torch

    from phi1.train import engine
    from phi1.train.batches import Layout
    from phi1.train.launch import Place, connect
    from phi1.train.recipe import Train
    from phi1.train.step import Trainer

    place = Place()
    machine = engine.start(place, plan.device, plan.precision, torch.get_num_threads())
    if not torch.distributed.is_initialized():
        engine.connect_processes(machine, place, connect(place))
    model = engine.build_model(plan.config, machine, seed=1)
    corpus: Any = RandomCorpus(plan.config.vocab_size)
    recipe = replace(Train(), batch_size=plan.batch, warmup_steps=0)
    trainer = Trainer(model, recipe, plan.tokens, corpus, Layout.of(plan.batch, plan.micro_batch, 0, 1), machine)
    return lambda: checked(trainer.run_step().loss, plan)


def transformers_step(plan: Plan, compile_mode: str | None = None) -> Step:
    """PhiForCausalLM, sdpa, autocast, fused AdamW, a loss scaler for float16."""
    import torch
    from transformers import PhiForCausalLM

    from phi1.bench.transformers_peer import phi_config

    torch.manual_seed(1)
    with torch.device(plan.device):
        model: Any = PhiForCausalLM(phi_config(plan.config, plan.config.residual_dropout)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    dtype = torch.float16 if plan.precision == "fp16" else torch.bfloat16
    scaler = torch.amp.GradScaler(plan.device, enabled=plan.precision == "fp16")
    forward = torch.compile(model, dynamic=False, mode=compile_mode) if compile_mode else model
    corpus, size = RandomCorpus(plan.config.vocab_size), plan.micro_batch or plan.batch
    step = 0

    def run() -> float:
        nonlocal step
        rows = torch.from_numpy(corpus.rows(np.arange(step * plan.batch, (step + 1) * plan.batch), plan.tokens))
        total = 0.0
        for part in rows.to(plan.device).split(size):
            with torch.autocast(plan.device, dtype):
                logits = forward(input_ids=part[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten())
            loss = loss * (size / plan.batch)
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        return checked(total, plan)

    return run


def checked(loss: float, plan: Plan) -> float:
    """The loss, which on random tokens stays near log V: far from it, something else than training was timed."""
    if not abs(loss - np.log(plan.config.vocab_size)) < 1.5:
        raise ArithmeticError(f"the loss is {loss:.4g}, not near log {plan.config.vocab_size}")
    return loss
