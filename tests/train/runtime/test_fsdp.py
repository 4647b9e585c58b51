"""The model on Triton kernels in the interpreter: two processes with FSDP have the gradients of one process."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.slow

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from phi1.config import preset
from phi1.kernels import backend
from phi1.model import Phi1
from phi1.train.runtime.launch import leave

rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
config = preset("nano", vocab_size=130, hidden_size=32, intermediate_size=80, num_hidden_layers=2,
                num_attention_heads=2, rotary_dim=8, max_position_embeddings=32, attention_dropout=0.1,
                residual_dropout=0.1)
model = Phi1(config)
model.init_weights(0)
if world > 1:
    mesh = init_device_mesh("cpu", (world,))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
ids = torch.randint(130, (2, 13), generator=torch.Generator().manual_seed(1))
own = slice(rank, rank + 1) if world > 1 else slice(0, 2)
with backend("triton"):
    loss = model.loss(ids[own, :-1], ids[own, 1:], rng=torch.tensor([3, 5]), sample_ids=torch.tensor([7, 9])[own])
    loss.backward()
gradients = {name: x.grad.full_tensor() if world > 1 else x.grad for name, x in model.named_parameters()}
if rank == 0:
    torch.save(gradients, f"{folder}/gradients-{world}.pt")
dist.destroy_process_group()
leave(0)
"""


def gradients(folder, world):
    """Return the gradients of a batch of two samples with dropout; each of two processes takes one sample."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(world), str(folder)], env=environment,
                                stderr=subprocess.PIPE, text=True, cwd=folder) for rank in range(world)]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    return torch.load(folder / f"gradients-{world}.pt")


def test_two_processes_have_the_gradients_of_one(tmp_path):
    whole, sharded = gradients(tmp_path, 1), gradients(tmp_path, 2)
    assert whole.keys() == sharded.keys()
    for name, wanted in whole.items():
        # Sums over the samples in another order.
        assert (sharded[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name
        assert wanted.abs().max() > 0, name
