"""Recomputation: the storages kept for the backward in each mode, and equal losses and gradients, sharded or not."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from training_runs import in_processes

from phi1 import testing
from phi1.config import preset
from phi1.kernels import backend
from phi1.kernels.block.parallel_block import RECOMPUTE
from phi1.model import Phi1
from phi1.train.plan.plan import activations
from phi1.train.recipe.recipe import ACTIVATIONS
from phi1.train.runtime import engine as engine_module

BATCH, TOKENS = 2, 24
RNG, SAMPLES = torch.tensor([5, 7]), torch.tensor([11, 3])


def config(dropout=0.0, **changes):
    return preset("nano", attention_dropout=dropout, residual_dropout=dropout, **changes)


def losses_and_gradients(model, loss, recompute):
    """Return the loss of one batch and every gradient, gathered from its shards."""
    model.recompute = recompute
    ids = torch.randint(model.config.vocab_size, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    out = loss(ids[:, :-1], ids[:, 1:], rng=RNG, sample_ids=SAMPLES)
    out.backward()
    gradients = {name: x.grad.full_tensor() if isinstance(x.grad, DTensor) else x.grad
                 for name, x in model.named_parameters()}
    return {"loss": out.detach(), **{name: x.clone() for name, x in gradients.items()}}


def check_modes(model, loss, reference):
    """Assert that all modes agree bit for bit with each other, and within a bound with the reference."""
    none, mlp, block = (losses_and_gradients(model, loss, recompute) for recompute in RECOMPUTE)
    for name, value in none.items():
        assert torch.equal(mlp[name], value), name
        assert torch.equal(block[name], value), name
        assert (value - reference[name]).abs().max() <= 2e-5 * reference[name].abs().max(), name


def made(dropout, **changes):
    model = Phi1(config(dropout, **changes)).train()
    model.init_weights(0)
    return model


def reference_of(model):
    with backend("reference"):
        return losses_and_gradients(model, model.loss, "none")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("compiled", [False, True])
def test_all_modes_agree_with_the_reference(dropout, compiled):
    torch._dynamo.reset()
    model = made(dropout, num_hidden_layers=2 if compiled else 4)
    loss = torch.compile(model.loss, fullgraph=True, backend="aot_eager") if compiled else model.loss
    check_modes(model, loss, reference_of(model))


def sharded_modes(rank, store):
    """Compare the sharded model of one of several processes with the whole model."""
    engine_module.GROUP_BYTES = 0
    engine = engine_module.start(rank, "cpu", "fp32", 1)
    engine_module.connect_processes(engine, rank, store)
    for dropout in (0.0, 0.1):
        model = engine_module.build_model(config(dropout), engine, seed=0).train()
        assert len(engine_module._sharded_modules(model)) == 1 + config().num_hidden_layers
        check_modes(model, model.loss, reference_of(made(dropout)))
    dist.destroy_process_group()


def test_two_processes_agree_in_all_modes(tmp_path):
    in_processes(2, sharded_modes, tmp_path)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("recompute", "mode"), list(zip(RECOMPUTE, ACTIVATIONS, strict=True)))
def test_the_storages_that_autograd_keeps_are_the_planned_ones(recompute, mode, dropout):
    """Count the embedding and all blocks, in 16 bits. No storage is so large that the allocator rounds it up."""
    model = made(dropout).bfloat16()
    model.recompute = recompute
    ids = torch.randint(model.config.vocab_size, (1, TOKENS))
    constants = [*model.parameters(), model.rotary_tables, RNG, SAMPLES]
    with testing.kept_bytes(constants) as kept:
        out = model._blocks(ids, None, None, None, rng=RNG, sample_ids=SAMPLES[:1])
    d = model.config.hidden_size
    planned = activations(model.config, TOKENS, 2, mode) - TOKENS * 2 * 2 * d  # the final norm's
    assert sum(kept.values()) == planned + ids.numel() * ids.itemsize
    layers = model.config.num_hidden_layers
    limit = {"none": 18.3, "mlp": 10.3, "block": 2.1}[recompute]
    assert planned <= limit * d * TOKENS * layers
    assert out.shape == (TOKENS, d)
