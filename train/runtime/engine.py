"""Processes, threads, precision and sharding: the part of a run that knows about the machine.

Distribution is PyTorch's FSDP2, also on a single GPU. A single process on a CPU uses `WorkingCopies` instead and
computes the same bits. In both cases parameters and gradients are fp32 DTensors between the steps, and the forward and
backward passes read copies in the precision of the arithmetic; there is no autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from phi1 import Phi1, Phi1Config, load
from phi1.mixed_precision import WorkingCopies
from phi1.train.runtime.adapters import adapt, adapted_weights, is_adapter, updates
from phi1.train.runtime.all_ranks import all_ranks, attempt, fail
from phi1.train.runtime.environment import surroundings
from phi1.train.runtime.launch import Rank, RunError, cores
from phi1.train.runtime.provenance import sources

if TYPE_CHECKING:
    from torch.distributed import Store

GROUP_BYTES = 16 << 20  # a smaller group costs more in calls than its overlap gains: 2 % of a step of nano on a CPU
# run.watchdog ends a collective that hangs, and names rank and step; PyTorch's own half hour would come first.
PATIENCE = timedelta(days=2)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Engine:
    """Device, precision and sharding of a run. Two runs with equal engines and recipes compute the same bits."""

    device: torch.device
    precision: str
    threads: int
    world_size: int
    shard_group: int = 0
    """Processes that share one copy of the states; 0 for all. Other groups hold replicas."""
    reshard: bool = False
    """Free each gathered block after each pass of a step, and reduce its gradients after each backward."""

    @property
    def replicas(self) -> int:
        """Copies of the states."""
        return self.world_size // (self.shard_group or self.world_size)

    @property
    def is_alone(self) -> bool:
        """True for a single process on a CPU: there is nothing to shard and nothing to overlap."""
        return self.world_size == 1 and self.device.type == "cpu"

    def environment(self) -> dict[str, Any]:
        """Return what must be equal for a bitwise replay; checkpoints and the ledger store it."""
        # Resharding changes the order in which gradients are added, and so the bits; but not with a single process.
        return {"world_size": self.world_size, "replicas": self.replicas, "threads": self.threads,
                "precision": self.precision, "device": self.device.type, "phi1": sources(),
                "reshard": self.reshard and self.world_size > 1} | surroundings(self.device)


def start(rank: Rank, device_name: str, precision: str, threads: int, shard_group: int = 0,
          reshard: bool = False) -> Engine:
    """Choose the device, the precision, the number of threads and the sharding. Nothing is connected yet.

    Raises:
        RunError: cuda is asked for and absent, there are more processes than GPUs, or shard_group does not divide them.
    """
    device = find_device(device_name, rank)
    # Set even at 0: torchrun gives several processes OMP_NUM_THREADS=1.
    threads = threads or max(1, cores() // rank.local_world_size)
    torch.set_num_threads(threads)
    return Engine(device, _precision(precision, device), threads, rank.world_size, rank.shard_group(shard_group),
                  reshard)


def find_device(name: str, rank: Rank) -> torch.device:
    """Return the device of this process. Raises RunError if there is none of that name."""
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("run.device: cuda is not available on this machine; cpu or auto would do")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if rank.local_rank >= torch.cuda.device_count():
        raise RunError(f"torchrun: {rank.local_world_size} processes on this machine, which has "
                       f"{torch.cuda.device_count()} GPUs: start one a GPU, or give --run.device cpu")
    device = torch.device("cuda", rank.local_rank)
    torch.cuda.set_device(device)
    return device


def _precision(name: str, device: torch.device) -> str:
    if name != "auto":
        return name
    if device.type == "cuda":
        return "fp16"
    capable: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions do not say: fp32
    fast = any(capable.get(flag, False) for flag in ("avx512_bf16", "amx_bf16", "sve_bf16"))
    return "bf16" if fast and torch.backends.mkldnn.is_available() else "fp32"


def connect_processes(engine: Engine, rank: Rank, store: Store) -> None:
    """Form the process group: gloo for tensors on the CPU, NCCL for tensors on GPUs."""
    backend = "cpu:gloo,cuda:nccl" if engine.device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, store=store, rank=rank.rank, world_size=rank.world_size, timeout=PATIENCE,
                                device_id=engine.device if engine.device.type == "cuda" else None)
    except RuntimeError as error:
        if "interface" not in str(error):
            raise
        raise RunError("gloo finds no network interface, and needs one even for one process: bring up the loopback "
                       "(ip link set lo up), or name another in GLOO_SOCKET_IFNAME") from None


def build_model(config: Phi1Config, engine: Engine, seed: int, init: str | None = None,
                lora: tuple[int, float] | None = None) -> Phi1:
    """Build a model whose `loss` computes in the engine's precision; nothing else of it may be called.

    The engine decides the sharding; each large block is one group. A single process on a CPU holds the whole model.

    Args:
        config: shape of the model.
        engine: device, precision and sharding.
        seed: of the initial weights.
        init: a folder or Hub id whose weights are taken instead.
        lora: rank and alpha of adapters, which alone are trained; None trains all parameters.

    Raises:
        RunError: `init` cannot be read, or has another shape.
    """
    model = Phi1(config, device=engine.device, dtype=torch.float32)
    model.init_weights(seed)
    if init is not None:
        _take_weights(model, init)
    if lora is not None:
        adapt(model, *lora, seed)
    mesh = _mesh(engine)
    if engine.is_alone:
        _hold_whole(model, mesh)
        WorkingCopies(model, DTYPES[engine.precision])
        return model
    # Inputs are not cast, because the rotary tables go into each block and must stay fp32.
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[engine.precision], reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for block in model.blocks:
        if sum(p.numel() * p.element_size() for p in block.parameters()) < GROUP_BYTES:
            continue  # a part of the model's own group
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=engine.reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(model, "loss")
    return model


def _mesh(engine: Engine) -> DeviceMesh:
    """Ranks that follow each other shard; one of each such group holds the same shard, and they add their gradients."""
    if engine.replicas == 1:
        return init_device_mesh(engine.device.type, (engine.world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(engine.device.type, (engine.replicas, engine.shard_group),
                            mesh_dim_names=("replicate", "shard"))


def _take_weights(model: Phi1, source: str) -> None:
    try:
        given = load(source, device="cpu", dtype=torch.float32)
        model.load_state_dict(given.state_dict())
    except (OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise RunError(f"model.init {source}: {' '.join(str(error).split())[:300]}") from None


def _hold_whole(model: Phi1, mesh: DeviceMesh) -> None:
    """Make each parameter a DTensor of one shard, as FSDP does."""
    for module in model.modules():
        for name, given in list(module.named_parameters(recurse=False)):
            whole = DTensor.from_local(given.detach(), mesh, [Shard(0)], run_check=False)
            setattr(module, name, nn.Parameter(whole, given.requires_grad))


def _sharded_modules(model: Phi1) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def peak_memory_gib(engine: Engine) -> float:
    """Return the peak memory of this process: its tensors on a GPU, or its resident set on a CPU."""
    if engine.device.type == "cuda":
        return torch.cuda.max_memory_allocated(engine.device) / 2**30
    # Not ru_maxrss, which starts at the size of the parent process. Only Linux has this file.
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20
    except (OSError, StopIteration):
        return 0.0


def set_last_micro_step(model: Phi1, last: bool, reshard: bool = False) -> None:
    """Tell FSDP before each micro-step if it is the last of its step.

    Gradients are reduced and parameters resharded at the last micro-step alone; with `reshard` at each one, so that no
    process ever holds all gradients. Replicas always add their gradients at the last one alone.

    The caller must announce the last micro-step. Otherwise parameters stay gathered while the optimizer steps, and all
    later steps would read stale ones without any error.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or reshard)
        model.set_reshard_after_backward(last or reshard)
        model.set_requires_all_reduce(last)


def reshard(model: Phi1) -> None:
    """Give up gathered parameters after forward passes that had no backward."""
    for module in _sharded_modules(model):
        module.reshard()


def gather(model: Phi1, take: Callable[[str, torch.Tensor], object]) -> None:
    """Collective: call `take` on every process with the name and the whole fp32 tensor of each parameter of a Phi1.

    Adapters are added to the weights that they update.

    Raises:
        Failed: on every process, if one has too little memory, or its `take` has failed.
    """
    parameters, error = dict(model.named_parameters()), None
    largest = max(parameters.values(), key=torch.Tensor.numel)
    # full_tensor() takes twice the parameter; a process that fails inside it would leave the others in a collective.
    room = 3 * largest.numel() if dist.get_world_size() > 1 else 0
    all_ranks(lambda: torch.empty(room, device=largest.device), keep=True)
    adapted = adapted_weights(model)
    for name, parameter in parameters.items():
        assert isinstance(parameter, DTensor), f"{name} is gathered: a step or an evaluation has not ended"
        if is_adapter(name):
            continue
        with torch.no_grad():
            whole = parameter.full_tensor()
            if name in adapted:
                lora, module = adapted[name]
                whole = whole + updates({key: cast(DTensor, own).full_tensor() for key, own in
                                         lora.named_parameters()}, lora.scale)[module]
            if error is None:
                error, _ = attempt(partial(take, name, whole))
    all_ranks(lambda: fail(error) if error else None)


def all_sum(*values: float) -> list[float]:
    """Collective: sum each value over all processes, in float64; every process gets the same bits."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()
