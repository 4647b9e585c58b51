"""Sharding: the collectives of a step, and equal results in each way of sharding. Real processes, with gloo."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import in_processes, save_checkpoint

from phi1.config import preset
from phi1.train.checkpoint.checkpoint import gather_weights, load_checkpoint
from phi1.train.data.batch_plan import BatchPlan
from phi1.train.data.corpus import open_corpus
from phi1.train.recipe.recipe import Train
from phi1.train.runtime import engine as engine_module
from phi1.train.runtime.launch import Rank, RunError
from phi1.train.step import trainer as step_module
from phi1.train.step.trainer import Trainer

CONFIG = preset("nano", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=64, attention_dropout=0.1, residual_dropout=0.1)
TRAIN = Train(steps=20, warmup_steps=2, batch_size=8, lr=1e-2, clip=0.5)


def make_trainer(rank, store, data, micro_batch, precision="fp32", **sharding):
    """Return a trainer whose blocks are FSDP groups of their own. The first call connects the processes."""
    engine_module.GROUP_BYTES = 0
    engine = engine_module.start(rank, "cpu", precision, 1, **sharding)
    if not dist.is_initialized():
        engine_module.connect_processes(engine, rank, store)
    batch_plan = BatchPlan.of(TRAIN.batch_size, micro_batch, rank.rank, rank.world_size)
    model = engine_module.build_model(CONFIG, engine, seed=1)
    return Trainer(model, TRAIN, 32, open_corpus(data, verify=False), batch_plan, engine)


def test_a_machine_without_a_network_interface_is_one_line(monkeypatch):
    def failing(text):
        def init(*args, **options):
            raise RuntimeError(text)
        return init

    engine = engine_module.start(Rank(), "cpu", "fp32", 1)
    monkeypatch.setattr(dist, "init_process_group", failing("Unable to find interface for: [127.0.0.1]"))
    with pytest.raises(RunError, match=r"gloo finds no network interface.*GLOO_SOCKET_IFNAME"):
        engine_module.connect_processes(engine, Rank(), None)
    monkeypatch.setattr(dist, "init_process_group", failing("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        engine_module.connect_processes(engine, Rank(), None)


class Collectives(TorchDispatchMode):
    """A count of the collectives that carry parameters and gradients, by name and dtype."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            self.counts[name.split("::")[1].strip("_"), str(args[1].dtype)] += 1
        elif name == "c10d::allreduce_" and args[0][0].dtype == torch.float32:  # all_sum's are float64
            self.counts["allreduce", "torch.float32"] += 1
        return function(*args, **(kwargs or {}))


def always_last(model, last, reshard):
    engine_module.set_last_micro_step(model, True)


def last_not_resharded(model, last, reshard):
    engine_module.set_last_micro_step(model, last)
    model.set_reshard_after_backward(False)


def collectives(rank, store, data, cases):
    """Return, for each case, the collectives of the second step and a row's loss after each of three steps.

    A step has 4 micro-steps.
    """
    found = []
    for mutation, sharding in cases:
        trainer = make_trainer(rank, store, data, 2 // rank.world_size, "bf16", **sharding)
        step_module.set_last_micro_step = globals().get(mutation, engine_module.set_last_micro_step)
        trainer.run_step()
        losses = [held_loss(trainer)]
        with Collectives() as seen:
            trainer.run_step()
        losses.append(held_loss(trainer))
        trainer.run_step()
        found.append((dict(seen.counts), [*losses, held_loss(trainer)]))
    dist.destroy_process_group()
    return found


def held_loss(trainer):
    """Return the loss of one row, the same in every process, with the parameters of the next step."""
    rows = torch.from_numpy(trainer.corpus.rows(np.arange(1), trainer.seq_len))
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.model.loss(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).item()
    engine_module.reshard(trainer.model)
    return loss


BLOCKS = CONFIG.num_hidden_layers
GROUPS = BLOCKS + 1  # the embedding, the last norm and the head are one group
GATHER, REDUCE = ("allgather_base", "torch.bfloat16"), ("reduce_scatter_base", "torch.float32")


def test_a_step_gathers_and_reduces_each_group_once_and_the_loss_moves(place, tmp_path):
    cases = [(None, {}), (None, {"reshard": True}), ("always_last", {}), (None, {"shard_group": 1}),
             (None, {"shard_group": 1, "reshard": True})]
    once = {GATHER: GROUPS, REDUCE: GROUPS}
    each_pass = {GATHER: 4 * (2 * BLOCKS + 1), REDUCE: 4 * GROUPS}
    each_micro_step = {GATHER: 4 * GROUPS, REDUCE: 4 * GROUPS}
    for found in in_processes(2, collectives, tmp_path, place / "data", cases):
        assert [counts for counts, _ in found[:3]] == [once, each_pass, each_micro_step]
        assert [counts["allreduce", "torch.float32"] for counts, _ in found[3:]] == [GROUPS] * 2  # replicas
        for _, losses in found:
            assert losses[0] > losses[1] > losses[2]


def test_a_last_micro_step_that_does_not_reshard_is_noticed(place, tmp_path):
    with pytest.raises(AssertionError, match="set_last_micro_step: no last one was run"):
        in_processes(2, collectives, tmp_path, place / "data", [("last_not_resharded", {})])


def trajectory(rank, store, data, folder, ways):
    """Return losses, norms, weights and saved bytes of four steps in each way of sharding.

    Each way takes its last two steps from the checkpoint that the way before it saved after two.
    """
    found, checkpoint = [], None
    for number, way in enumerate(ways):
        trainer = make_trainer(rank, store, data, 2 if rank.world_size < 4 else 1, **way)
        outcomes = [trainer.run_step(), trainer.run_step()]
        if checkpoint:
            load_checkpoint(trainer, checkpoint)
        checkpoint = save_checkpoint(trainer, folder / f"{rank.world_size}-{number}", {}, 1)
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        outcomes += [trainer.run_step(), trainer.run_step()]
        weights = gather_weights(trainer.model)
        whole = torch.cat([weights[name].flatten() for name in sorted(weights)]).clone() if weights else None
        found.append(([o.loss for o in outcomes], [o.norm for o in outcomes], whole, size))
    dist.destroy_process_group()
    return found


def test_no_way_of_sharding_changes_what_is_computed(place, tmp_path):
    ways = [{}, {"shard_group": 2}, {"shard_group": 4, "reshard": True}, {"shard_group": 2, "reshard": True}]
    [[(losses, norms, weights, size)]] = in_processes(1, trajectory, tmp_path, place / "data", tmp_path, [{}])
    two = in_processes(2, trajectory, tmp_path, place / "data", tmp_path, [{}])
    four = in_processes(4, trajectory, tmp_path, place / "data", tmp_path, ways)
    for way in two[0] + four[0]:
        assert way[0] == pytest.approx(losses, rel=1e-6)
        assert way[1] == pytest.approx(norms, rel=1e-5)
        # All weights together: Adam makes a whole step of a gradient that is only rounding.
        assert torch.linalg.vector_norm(way[2] - weights) <= 1e-3 * torch.linalg.vector_norm(weights)
        assert way[3] < 1.5 * size  # no shard is written twice; four times as many files have their headers
    for other in four[1:]:  # every process sees the same numbers
        assert [way[:2] for way in other] == [way[:2] for way in four[0]]


def overflow_on_rank_1(rank, store, data, sharding):
    """Return outcomes and scales of four steps; in the second the gradient of one process is not finite."""
    trainer, found = make_trainer(rank, store, data, 2, "fp16", **sharding), []
    trainer.scaler.patience = 1
    whole = trainer.model.loss
    for step in range(4):
        factor = math.inf if step == 1 and rank.rank == 1 else 1.0
        trainer.model.loss = lambda *args, factor=factor, **kwargs: ScaleGradient.apply(whole(*args, **kwargs), factor)
        found.append((trainer.run_step(), trainer.scaler.scale))
    dist.destroy_process_group()
    return found


class ScaleGradient(torch.autograd.Function):
    """Multiply the gradient by a factor, and leave the value as it is."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


@pytest.mark.parametrize("sharding", [{}, {"shard_group": 1}], ids=["sharded", "replicas"])
def test_an_overflow_on_one_process_skips_the_step_on_all(place, tmp_path, sharding):
    one, other = in_processes(2, overflow_on_rank_1, tmp_path, place / "data", sharding)
    assert [outcome.skipped for outcome, _ in one] == [False, True, False, False]
    assert [scale for _, scale in one] == [65536, 32768, 32768, 32768]
    assert not math.isfinite(one[1][0].norm)
    assert repr(one) == repr(other)  # not ==, since NaN is not NaN
    assert one[3][0].loss < one[0][0].loss


def test_a_group_that_does_not_divide_is_refused():
    assert Rank(0, 8, 0, 4).shard_group(0) == 4
    assert Rank(0, 8, 0, 4).shard_group(2) == 2
    with pytest.raises(RunError, match=r"run\.shard_group must divide the number of processes, 8; got 3$"):
        Rank(0, 8, 0, 4).shard_group(3)


def test_the_order_of_sums_is_part_of_what_equal_bits_need():
    def environment(world_size, reshard):
        return engine_module.Engine(torch.device("cpu"), "fp32", 1, world_size, 0, reshard).environment()

    assert environment(2, True) != environment(2, False)
    assert environment(1, True) == environment(1, False)
