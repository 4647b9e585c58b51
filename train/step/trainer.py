"""One optimizer step: accumulate over micro-steps, reduce, clip, update.

The loss of a step is the mean over the target tokens of the whole batch, on all processes. A step whose gradient is not
finite is skipped in every precision; it still consumes its samples and its place in the schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from phi1 import Phi1
from phi1.train.data.batch_plan import BatchPlan, samples_hash, samples_of_step
from phi1.train.data.corpus import Corpus
from phi1.train.data.prefetch import Batch, Prefetch
from phi1.train.recipe.recipe import Train
from phi1.train.runtime.engine import Engine, all_sum, set_last_micro_step
from phi1.train.runtime.launch import RunError
from phi1.train.step.grad_scaler import GradScaler
from phi1.train.step.nonfinite import find_nonfinite
from phi1.train.step.schedule import learning_rate


class UnreadableData(RunError):
    """A process could not read its part of a step. Nothing of the step has been computed."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step; the same on every process, and in every replay."""

    step: int
    """Number of finished steps, including this one."""
    loss: float
    """Nats a target token, mean over the global batch."""
    lr: float
    norm: float
    """Global norm of the gradient before clipping."""
    scale: float
    """Loss scale of the step; 1 outside fp16."""
    skipped: bool
    samples: str
    """Hash of the batch's sample ids."""


def make_optimizer(model: Phi1, train: Train) -> torch.optim.AdamW:
    """Make AdamW over the trained fp32 weights. Matrices decay, embedding and head too; biases and norms do not."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        # By name, not by number of axes: out_proj.bias has two, one row each for dense and fc2.
        (kept if name.endswith("bias") or "norm" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)
    # Made here, not at the first step: torch's checkpointing creates a missing state by a step of its own, and a run
    # that saves before its first update would differ from one that does not.
    for parameter in trained.values():
        optimizer.state[parameter] = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                                      "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return optimizer


class Trainer:
    """The model, its optimizer and loss scaler, and the number of finished steps: all that a checkpoint holds.

    Args:
        model: from `engine.build_model`.
        train: the recipe's optimization.
        seq_len: T.
        corpus: training split.
        batch_plan: the division of a batch.
        engine: device, precision and sharding.
    """

    def __init__(self, model: Phi1, train: Train, seq_len: int, corpus: Corpus, batch_plan: BatchPlan,
                 engine: Engine) -> None:
        self.model, self.train, self.seq_len, self.corpus = model, train, seq_len, corpus
        self.batch_plan, self.engine = batch_plan, engine
        self.optimizer = make_optimizer(model, train)
        self.scaler = GradScaler(train, enabled=engine.precision == "fp16")
        self.n_samples = corpus.n_samples(seq_len)
        self._prefetch = Prefetch(self._read, engine.device)
        self.finished = self.skipped = 0
        self.skips = 0
        """Number of steps in a row that were skipped."""
        self.usual_loss = 0.0
        """Running mean over about 50 steps that were not skipped; 0 before the first."""
        self.problem = self.cure = ""
        """Reason of the last skipped step, and a remedy."""

    def set_batch(self, batch_size: int, micro_batch: int) -> None:
        """Use another batch size, or other micro-batches, from the next step on; a batch read ahead is dropped."""
        self.train = replace(self.train, batch_size=batch_size)
        self.batch_plan = BatchPlan.of(batch_size, micro_batch, self.batch_plan.rank, self.batch_plan.world_size)
        self._prefetch.forget()

    def run_step(self) -> Outcome:
        """Take the next step."""
        step, train = self.finished, self.train
        batch, count = self._batch(step)
        lr, scale = learning_rate(step, train), self.scaler.scale
        loss = self._accumulate(step, batch.micro_batches, count)
        gradients = local_gradients(self.model)
        norm = self._norm(gradients) / scale
        finite = math.isfinite(norm) and math.isfinite(loss)
        limit = train.max_loss_jump * self.usual_loss or math.inf
        taken = finite and loss <= limit
        lower = f"{train.lr / 3:.2g}"
        if taken:
            self._update(gradients, lr, norm, scale)
            self.usual_loss += (loss - self.usual_loss) * (0.02 if self.usual_loss else 1.0)
        elif finite:
            self.problem = f"its loss is beyond {limit:.4g} (train.max_loss_jump)"
            self.cure = f"a larger --train.max_loss_jump, or with --run.change train.lr={lower}"
        else:
            self.problem = "its gradient is not finite"
            self.cure = (f"--run.change train.lr={lower}, from a checkpoint before the loss rose "
                         "(--checkpoint.resume), or with another --train.precision")
            if self.scaler.enabled and scale <= train.loss_scale_floor:
                self.problem += f", with the loss scale at train.loss_scale_floor, {scale:g}"
                self.cure = "--run.change train.loss_scale_floor=1" if scale > 1 else self.cure
            if train.find_nonfinite:
                found = find_nonfinite(self.model, lambda: self._accumulate(step, batch.micro_batches, count),
                                       [ids for ids, _ in batch.micro_batches])
                self.problem += f"; first {found or 'no operation of its replay'}"
        self.scaler.update(finite)
        self.optimizer.zero_grad(set_to_none=True)
        self.finished += 1
        self.skipped += not taken
        self.skips = 0 if taken else self.skips + 1
        return Outcome(self.finished, loss, lr, norm, scale, not taken, samples_hash(batch.samples))

    def _batch(self, step: int) -> tuple[Batch, float]:
        """Collective: return this process's part of a step's batch, and the number of target tokens in the whole batch.

        Raises:
            UnreadableData: on every process, if one could not read its part.
        """
        batch, problem = None, ""
        try:
            batch = self._prefetch.take(step)
        except (OSError, ValueError) as error:
            problem = (f"rank {self.batch_plan.rank} could not read its data of step {step + 1}: {error}; phi1 verify "
                       f"{self.corpus.folder} says more")
        count, failures = all_sum(batch.n_targets if batch else 0, batch is None)
        if failures:
            problems = [problem] * self.engine.world_size
            dist.all_gather_object(problems, problem)
            raise UnreadableData(next(filter(None, problems)))
        assert batch
        return batch, count

    def _read(self, step: int) -> Batch:
        samples = samples_of_step(step, self.train.batch_size, self.train.seed, self.n_samples)
        return Batch.read(self.corpus, samples, self.batch_plan, self.seq_len, self.engine.device)

    def _accumulate(self, step: int, batches: list[tuple[Tensor, Tensor]], count: float) -> float:
        """Run forward and backward of all micro-steps. Returns the global mean loss."""
        self.model.train()
        device, batch_plan = self.engine.device, self.batch_plan
        rng = torch.tensor([self.train.seed, step], device=device)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for index, (ids, tokens) in enumerate(batches):
            set_last_micro_step(self.model, index == len(batches) - 1, self.engine.reshard)
            rows = tokens.to(device, non_blocking=True)
            loss = self.model.loss(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), reduction="sum", rng=rng,
                                   sample_ids=ids.to(device, non_blocking=True))
            total += loss.detach().double()
            # FSDP averages gradients over the processes; times world_size this is the sum.
            (loss * (self.scaler.scale * batch_plan.world_size / count)).backward()
        (loss_sum,) = all_sum(total.item())
        return loss_sum / count

    def _norm(self, gradients: list[Tensor]) -> float:
        """Return the global norm of the scaled gradient: the same bits on every process and in a replay."""
        # Row by row, then in float64: over a million elements at once PyTorch's float32 norm is off by 1e-5 on CPUs.
        # The error depends on the sharding, and clipping would carry it into the parameters.
        rows = torch.cat([torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients])
        (squares,) = all_sum(rows.double().square().sum().item())
        return math.sqrt(squares / self.engine.replicas) if squares >= 0 else math.nan

    def _update(self, gradients: list[Tensor], lr: float, norm: float, scale: float) -> None:
        """Unscale and clip the gradient, which is finite on every process, and take an optimizer step."""
        clip = self.train.clip
        factor = (clip / norm if clip and norm > clip else 1.0) / scale
        if factor != 1:
            for gradient in gradients:
                gradient.mul_(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()


def local_gradients(model: nn.Module) -> list[Tensor]:
    """Return this process's shard of every gradient."""
    parameters = list(model.parameters())
    # Otherwise the optimizer would step parameters that no pass reads, and the loss would not fall.
    assert all(isinstance(parameter, DTensor) for parameter in parameters), "set_last_micro_step: no last one was run"
    return [parameter.grad.to_local() for parameter in parameters if isinstance(parameter.grad, DTensor)]
