"""One optimizer step on random tokens, as phi1's trainer takes it and as transformers' users write it.

Both compute the same, from the same weights on the same batches: gradients of the mean cross-entropy, global-norm
clipping at 1, an AdamW update of float32 master weights in which matrices decay. phi1 runs its trainer: on a GPU FSDP2
at one process, on a CPU 16-bit copies of the weights. transformers runs under autocast with a loss scaler, its usual
way, in bfloat16 on a CPU and in float16 on a GPU; without autocast, in float32, it is the measure of both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from phi1.config import Phi1Config, preset

JUDGED = 3
"""Steps from the start whose losses and gradients are compared."""
SEED = 1
LOSS_SCALE = 1024.0  # of float16 runs, on both sides: at a trainer's first one a step may be skipped to find another


@dataclass(frozen=True)
class Plan:
    """The model, batch and precision of a training step.

    Args:
        config: the model's shape; its dropout counts.
        batch: sequences.
        tokens: tokens in a sequence.
        device: "cpu" or "cuda".
        precision: "bf16" or "fp16"; for transformers also "fp32".
        micro_batch: sequences at a time; 0 for all.
    """

    config: Phi1Config
    batch: int
    tokens: int
    device: str = "cpu"
    precision: str = "bf16"
    micro_batch: int = 0

    @property
    def recipe(self) -> Any:
        """The trainer's optimization."""
        from phi1.train.recipe.recipe import Train

        return replace(Train(), batch_size=self.batch, warmup_steps=0, loss_scale=LOSS_SCALE, seed=SEED)

    def initial(self) -> Any:
        """A model with the weights from which everyone starts."""
        from phi1.model import Phi1

        model = Phi1(self.config, device=torch.device(self.device), dtype=torch.float32)
        model.init_weights(SEED)
        return model


def cpu_plan(vocab_size: int, tokens: int = 256) -> Plan:
    """The plan of the comparison on a CPU: 4 layers of width 256, batches of 8 rows of `tokens` tokens, bf16."""
    return Plan(preset("nano", vocab_size=vocab_size, num_hidden_layers=4, hidden_size=256, intermediate_size=1024),
                batch=8, tokens=tokens)


@dataclass
class RandomCorpus:
    """Uniform random tokens in the trainer's corpus interface; the speed of a step does not depend on them."""

    vocab_size: int
    fingerprint: str = "random"

    def n_samples(self, seq_len: int) -> int:
        return 1 << 20

    def rows(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        return np.stack([np.random.default_rng(int(i)).integers(self.vocab_size, size=seq_len + 1) for i in indices])


class Step(ABC):
    """A sequence of training steps; a call takes the next one and returns its loss."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._before: tuple[float, float] | None = None

    @abstractmethod
    def restart(self) -> None:
        """Return to the initial weights and the first batch."""

    @abstractmethod
    def take(self) -> tuple[float, float]:
        """Take a step; its loss, and the norm of its gradient before clipping."""

    @abstractmethod
    def bias(self) -> torch.Tensor:
        """The head's bias: its gradient is the largest beside its rounding, and AdamW's first steps follow signs."""

    def __call__(self, inputs: Any = None) -> float:
        taken = loss, _ = self.take()
        if not abs(loss - math.log(self.plan.config.vocab_size)) < 1.5:  # of random tokens it stays near log V
            raise ArithmeticError(f"the loss is {loss:.4g}, not near log {self.plan.config.vocab_size}")
        if taken == self._before:
            raise ArithmeticError("two steps have the same loss and gradient: the second was not taken")
        self._before = taken
        return loss

    def judged(self) -> tuple[torch.Tensor, ...]:
        """Take the first JUDGED steps anew; their losses above log V and gradient norms, then the head's bias."""
        self.restart()
        taken = torch.tensor([self.take() for _ in range(JUDGED)], dtype=torch.float64)
        return taken[:, 0] - math.log(self.plan.config.vocab_size), taken[:, 1], self.bias().detach().clone()


class Phi1Step(Step):
    """The trainer's own step."""

    def __init__(self, plan: Plan) -> None:
        from phi1.train.data.batch_plan import BatchPlan
        from phi1.train.runtime import engine
        from phi1.train.runtime.launch import Rank, connect
        from phi1.train.step.trainer import Trainer

        super().__init__(plan)
        rank = Rank()
        machine = engine.start(rank, plan.device, plan.precision, torch.get_num_threads())
        if not torch.distributed.is_initialized():
            engine.connect_processes(machine, rank, connect(rank))
        model = engine.build_model(plan.config, machine, SEED)
        corpus: Any = RandomCorpus(plan.config.vocab_size)
        self.trainer = Trainer(model, plan.recipe, plan.tokens, corpus,
                               BatchPlan.of(plan.batch, plan.micro_batch, 0, 1), machine)

    @torch.no_grad()
    def restart(self) -> None:
        trainer, initial = self.trainer, self.plan.initial().state_dict()
        for name, parameter in trainer.model.named_parameters():
            _local(parameter).copy_(initial[name])
        for state in trainer.optimizer.state.values():
            for value in state.values():
                value.zero_()
        trainer.finished, trainer.usual_loss, self._before = 0, 0.0, None

    def take(self) -> tuple[float, float]:
        outcome = self.trainer.run_step()
        return outcome.loss, outcome.norm

    def bias(self) -> torch.Tensor:
        return _local(self.trainer.model.get_parameter("head.bias"))


def _local(parameter: Any) -> torch.Tensor:
    """The whole parameter, which a single process holds."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


class TransformersStep(Step):
    """PhiForCausalLM, sdpa, autocast, fused AdamW, a loss scaler for float16.

    Args:
        plan: what a step works on.
        compile_mode: of torch.compile; None for eager.
    """

    def __init__(self, plan: Plan, compile_mode: str | None = None) -> None:
        super().__init__(plan)
        self.model = _causal_model(plan).train()
        self.forward = torch.compile(self.model, dynamic=False, mode=compile_mode) if compile_mode else self.model
        self.corpus = RandomCorpus(plan.config.vocab_size)
        self._begin()

    def _begin(self) -> None:
        recipe, named = self.plan.recipe, list(self.model.named_parameters())
        groups = [{"params": [parameter for name, parameter in named if _decays(name) == decays],
                   "weight_decay": recipe.weight_decay if decays else 0.0} for decays in (True, False)]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=True)
        self.scaler = torch.amp.GradScaler(self.plan.device, init_scale=LOSS_SCALE,
                                           enabled=self.plan.precision == "fp16")
        self.finished, self._before = 0, None

    def restart(self) -> None:
        self.model.load_state_dict(_causal_model(self.plan).state_dict())
        self._begin()

    def take(self) -> tuple[float, float]:
        from phi1.train.data.batch_plan import samples_of_step
        from phi1.train.step.schedule import learning_rate

        plan, recipe = self.plan, self.plan.recipe
        samples = samples_of_step(self.finished, plan.batch, SEED, self.corpus.n_samples(plan.tokens))
        rows = torch.from_numpy(self.corpus.rows(samples, plan.tokens)).to(plan.device)
        size, dtype = plan.micro_batch or plan.batch, torch.float16 if plan.precision == "fp16" else torch.bfloat16
        total = 0.0
        for part in rows.split(size):
            with torch.autocast(plan.device, dtype, enabled=plan.precision != "fp32"):
                logits = self.forward(input_ids=part[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten())
            loss = loss * (size / plan.batch)
            self.scaler.scale(loss).backward()
            total += loss.item()
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.finished, recipe)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.finished += 1
        return total, float(norm)

    def bias(self) -> torch.Tensor:
        return self.model.lm_head.bias


def _causal_model(plan: Plan) -> Any:
    from phi1.bench.peers.hf_transformers import causal_model

    return causal_model(plan.initial(), plan.config, plan.config.residual_dropout)


def _decays(name: str) -> bool:
    return not (name.endswith("bias") or "norm" in name)
