"""The needs of a run before any GPU is rented: memory of a GPU by component, time, collectives, cost.

The states (parameters, gradients, optimizer) are exact, both for FSDP2 as `engine.py` sets it up and for a single
process on a CPU, which uses no FSDP2. With FSDP2 parameters stay gathered within a step, and gradients of several
micro-steps add up unsharded, in float32. Activations follow from what the operations save. Time is arithmetic over the
GPU's peak times an MFU; the plan says if that was assumed or measured on such a GPU.

P parameters, W GPUs, L layers, D width, F MLP, V vocabulary, H heads, T tokens of a sequence, b sequences of a
micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from phi1.config import Phi1Config
from phi1.gpus import Gpu
from phi1.train.data.batch_plan import divisors
from phi1.train.recipe.recipe import ACTIVATIONS, Recipe
from phi1.train.runtime.launch import RunError

GIB = 1 << 30
ELEMENT_BYTES = {"auto": 2, "fp16": 2, "bf16": 2, "fp32": 4}
WORKSPACE_BYTES = 256 << 20  # linear_cross_entropy's default
CONTEXT_BYTES = 1.5 * GIB  # CUDA's context, cuBLAS' workspaces and NCCL's buffers: an assumption
PYTHON_BYTES = 0.3 * GIB  # resident with all modules imported, torch 2.13 on a CPU
FRAGMENTATION = 0.04  # share of the GPU's memory that is kept free: an assumption
ASSUMED_MFU = 0.40  # phi-1's card comes to 0.38 on A100, published runs of this size to 0.42-0.60
NODE_LINK_GB_PER_S = 25.0  # from each GPU to other nodes, by a 200 Gbit/s card: an assumption
NODE_GPUS = 8  # the most that a plan proposes for a node
LINK_EFFICIENCY = 0.75  # share of the data sheet's speed in a large all-gather: an assumption
CARD_TOKENS, CARD_DAYS, CARD_GPUS = 54e9, 6.0, 8
SCHEDULE_TOKENS = 36_000 * 1024 * 2048
PAPER_TOKENS, PAPER_GPU_HOURS = 51e9, 770.0


@dataclass(frozen=True)
class Cluster:
    """W GPUs of one kind on some nodes, and the price of one per hour."""

    gpu: Gpu
    gpus: int
    nodes: int = 1
    price: float | None = None
    mfu: float = ASSUMED_MFU
    mfu_source: str = "assumed"
    of: str = "GPU"
    """The owner of the planned memory: a GPU, or on CPUs a process."""

    @property
    def is_alone(self) -> bool:
        """True for a single process on a CPU, which uses no FSDP."""
        return self.of != "GPU" and self.gpus == 1


def states(config: Phi1Config, shards: int, element: int, micro_steps: int, reshard: bool = False,
           alone: bool = False, adapters: int = 0) -> dict[str, float]:
    """Return the bytes of a GPU at the end of a step's last backward; they do not depend on the micro-batch.

    With `reshard` at most two blocks are gathered, beside the parameters outside the blocks, and gradients add up in
    shards. A process `alone` on a CPU has copies of the parameters in 16 bits alone, and adds gradients up in place.
    With `adapters`, so many parameters alone are trained, and the backward keeps each block's updated weights.
    """
    p, d, v = config.num_parameters, config.hidden_size, config.vocab_size
    outside, trained = 2 * v * d + v + 2 * d, adapters or p
    gathered = outside + (p - outside) * min(1.0, 2 / config.num_hidden_layers) if reshard else p
    if alone:
        gathered = p if element < 4 else 0
    return {
        "parameters, fp32, sharded": 4 * (p + adapters) / shards,
        "gradients, fp32, sharded": 4 * trained / shards,
        "AdamW's two moments, fp32, sharded": 8 * trained / shards,
        f"parameters, gathered, {8 * element} bits": element * gathered,
        "gradients of the micro-steps, fp32": 4 * trained if micro_steps > 1 and not reshard and not alone else 0,
    } | ({"weights of the blocks with adapters": element * (p - outside)} if adapters else {})


def shards_of(recipe: Recipe, cluster: Cluster) -> int:
    """Return the number of GPUs that share one copy of the states: those of a node, if the recipe does not say."""
    return recipe.run.shard_group or cluster.gpus // cluster.nodes


def activations(config: Phi1Config, seq_len: int, element: int, mode: str = "none") -> float:
    """Return the bytes that a forward keeps for the backward, per sequence.

    Each block keeps x, q, k, v, att, lse and pre, or as much of that as the mode leaves. Besides there are the last
    norm's input and output, and the positions.
    """
    d, f = config.hidden_size, config.intermediate_size
    columns = {"none": 5 * d + f, "recompute-mlp": 5 * d, "block": d}[mode]
    per_token = element * columns + (0 if mode == "block" else 4 * config.num_attention_heads)
    return seq_len * (config.num_hidden_layers * per_token + 2 * element * d + 8)


def recomputed_flops_per_token(config: Phi1Config, seq_len: int, mode: str) -> float:
    """Return the floating-point operations that the mode adds to training on one token."""
    d, f = config.hidden_size, config.intermediate_size
    of_a_layer = {"none": 0, "recompute-mlp": 2 * d * f, "block": 2 * d * (3 * d + f) + 4 * d * seq_len}[mode]
    return config.num_hidden_layers * of_a_layer


def transients(config: Phi1Config, seq_len: int, element: int, micro_batch: int, shards: int,
               mode: str = "none") -> dict[str, float]:
    """Return the bytes of buffers that live for a part of the step. They do not overlap, so the largest counts."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    tokens = micro_batch * seq_len
    again = {"none": 0, "recompute-mlp": f, "block": 4 * d + f}[mode]
    block = tokens * element * ((3 * d + f) + 2 * (d + f) + 3 * d + again)
    loss = WORKSPACE_BYTES + (4 + element) * v * d + 2 * element * tokens * d
    largest_group = v * d * 2 + v + 2 * d
    reduction = largest_group * (element + 4 + 4 / shards)
    return {"backward of one block": block, "chunk of logits, head's gradient": loss,
            "buffers of the largest reduction": reduction}


def moments(recipe: Recipe, cluster: Cluster, micro_batch: int) -> list[tuple[str, float]]:
    """Return the buffers that live for a part of the step, largest first; the first one counts."""
    found = transients(recipe.phi1_config(), recipe.data.seq_len, ELEMENT_BYTES[recipe.train.precision], micro_batch,
                       shards_of(recipe, cluster), recipe.train.activations)
    if cluster.is_alone:
        del found["buffers of the largest reduction"]
    return sorted(found.items(), key=lambda item: -item[1])


def memory(recipe: Recipe, cluster: Cluster, micro_batch: int) -> dict[str, float]:
    """Return the bytes of a GPU by component."""
    config, seq_len = recipe.phi1_config(), recipe.data.seq_len
    element, mode = ELEMENT_BYTES[recipe.train.precision], recipe.train.activations
    micro_steps = recipe.train.batch_size // (cluster.gpus * micro_batch)
    shards = shards_of(recipe, cluster)
    (largest, passing), *_ = moments(recipe, cluster, micro_batch)
    return {
        **states(config, shards, element, micro_steps, recipe.run.reshard, cluster.is_alone, recipe.adapters()),
        f"activations of {micro_batch} sequences": micro_batch * activations(config, seq_len, element, mode),
        f"for a moment: {largest}": passing,
        **({"CUDA, cuBLAS and NCCL (assumed)": CONTEXT_BYTES} if cluster.of == "GPU" else
           {"Python and PyTorch": PYTHON_BYTES}),
        "fragmentation (assumed)": FRAGMENTATION * cluster.gpu.memory_gib * GIB,
    }


def largest_micro_batch(recipe: Recipe, cluster: Cluster) -> int:
    """Return the largest divisor of a GPU's share of the batch that fits; 0 if none does.

    Raises:
        RunError: the batch does not divide over the GPUs.
    """
    if recipe.train.batch_size % cluster.gpus:
        fitting = ", ".join(map(str, divisors(recipe.train.batch_size)))
        raise RunError(f"--gpus must divide train.batch_size, {recipe.train.batch_size}; got {cluster.gpus}; "
                       f"{fitting} would do")
    share = recipe.train.batch_size // cluster.gpus
    fits = [b for b in divisors(share)
            if sum(memory(recipe, cluster, b).values()) <= cluster.gpu.memory_gib * GIB]
    return max(fits, default=0)


@dataclass(frozen=True)
class Duration:
    """Seconds of one step: the arithmetic alone, and the collectives alone."""

    arithmetic: float
    collectives: float

    @property
    def step(self) -> float:
        """The longer of the two, since collectives overlap the first and the last micro-step's arithmetic."""
        return max(self.arithmetic, self.collectives)


def duration(recipe: Recipe, cluster: Cluster, micro_steps: int = 1) -> Duration:
    """Return the time of a step with one all-gather of the parameters and one float32 reduce-scatter of the gradients.

    With run.reshard each micro-step has two all-gathers and one reduce-scatter. Replicas then add their shards of the
    gradients.
    """
    config, seq_len, w = recipe.phi1_config(), recipe.data.seq_len, cluster.gpus
    tokens = recipe.train.batch_size * seq_len
    peak = cluster.gpu.float_tflops if recipe.train.precision == "fp32" else cluster.gpu.half_tflops
    shards, inside, outside = shards_of(recipe, cluster), cluster.gpu.link_gb_per_s, NODE_LINK_GB_PER_S
    gathers, reductions = (2 * micro_steps, micro_steps) if recipe.run.reshard else (1, 1)
    sharded = gathers * ELEMENT_BYTES[recipe.train.precision] + reductions * 4
    seconds = config.num_parameters / (LINK_EFFICIENCY * 1e9) * (
        sharded * (shards - 1) / shards / (inside if shards * cluster.nodes <= w else outside)
        + 2 * 4 / shards * (1 - shards / w) / (inside if cluster.nodes == 1 else outside))
    flops = config.flops_per_token(seq_len) + recomputed_flops_per_token(config, seq_len, recipe.train.activations)
    return Duration(tokens * flops / (w * peak * 1e12 * cluster.mfu), seconds)


def report(recipe: Recipe, cluster: Cluster) -> list[str]:
    """Return the lines of the plan. Raises RunError if the batch does not divide over the cluster."""
    best = largest_micro_batch(recipe, cluster)
    share = recipe.train.batch_size // cluster.gpus
    chosen = recipe.train.micro_batch_size or best or 1
    if share % chosen:
        raise RunError(f"train.micro_batch_size must divide {recipe.train.batch_size} / {cluster.gpus} = {share}; got "
                       f"{chosen}; {', '.join(map(str, divisors(share)))} would do")
    return [_title(recipe, cluster, chosen, share), "", *memory_lines(recipe, cluster, chosen, best), "",
            *_time_lines(recipe, cluster, share // chosen), *_reconciliation(recipe)]


def _title(recipe: Recipe, cluster: Cluster, micro_batch: int, share: int) -> str:
    config, nodes = recipe.phi1_config(), f"{cluster.nodes} node" + "s" * (cluster.nodes > 1)
    return (f"{recipe.model.preset}, {config.num_parameters:,} parameters, on {cluster.gpus} x {cluster.gpu.name} "
            f"({nodes}), {recipe.train.precision}: {share // micro_batch} micro-steps of {micro_batch} x "
            f"{recipe.data.seq_len} tokens on each GPU")


def memory_lines(recipe: Recipe, cluster: Cluster, micro_batch: int, best: int) -> list[str]:
    parts = memory(recipe, cluster, micro_batch)
    need, have = sum(parts.values()) / GIB, cluster.gpu.memory_gib
    lines = [f"memory of a {cluster.of}, GiB",
             *(f"  {name:<46}{n_bytes / GIB:8.2f}" for name, n_bytes in parts.items()),
             f"  {'in all':<46}{need:8.2f}  of {have:.1f}: {'fits' if need <= have else 'DOES NOT FIT'}",
             "  less at other moments: " + "; ".join(f"{name} {n_bytes / GIB:.2f}" for name, n_bytes in
                                                     moments(recipe, cluster, micro_batch)[1:])]
    if best == 0:
        lines.append("no micro-batch fits: " + ", or ".join(_ways_out(recipe, cluster)))
    elif need > have:
        lines.append(", or ".join([f"set train.micro_batch_size to {best}, the largest that fits",
                                   *_proposal(recipe, cluster, micro_batch)]))
    elif best > micro_batch:
        lines.append(f"train.micro_batch_size up to {best} fits")
    return lines


def _ways_out(recipe: Recipe, cluster: Cluster) -> list[str]:
    """List the ways to make one sequence fit: settings, or the smallest number of GPUs, by doubling, in a node."""
    ways = _settings(recipe, cluster)
    if cluster.of != "GPU":
        return [*ways, f"give each {cluster.of} more memory"]
    for gpus in (cluster.gpus << doubled for doubled in range(1, 4)):
        if gpus > NODE_GPUS * cluster.nodes or recipe.train.batch_size % gpus:
            break
        more = replace(cluster, gpus=gpus)
        if largest_micro_batch(recipe, more):
            ways.append(f"take {gpus} GPUs")
            break
        if not ways and (settings := _settings(recipe, more)):
            ways.append(f"take {gpus} GPUs and {settings[0]}")
    return [*ways, "take GPUs with more memory"]


def _settings(recipe: Recipe, cluster: Cluster) -> list[str]:
    """List each setting that makes one sequence fit, or the two that do so together."""
    ways, resharding = _proposal(recipe, cluster, 1), replace(recipe, run=replace(recipe.run, reshard=True))
    if recipe.run.reshard:
        return ways
    if largest_micro_batch(resharding, cluster):
        return [*ways, "set run.reshard to true"]
    least = replace(resharding, train=replace(recipe.train, activations=ACTIVATIONS[-1]))
    if not ways and largest_micro_batch(least, cluster):
        return [f"set run.reshard to true and train.activations to {ACTIVATIONS[-1]}"]
    return ways


def _proposal(recipe: Recipe, cluster: Cluster, micro_batch: int) -> list[str]:
    """Propose the first mode that keeps less and makes this micro-batch fit, with its cost; empty if there is none."""
    before = duration(recipe, cluster).arithmetic
    for mode in ACTIVATIONS[ACTIVATIONS.index(recipe.train.activations) + 1 :]:
        proposed = replace(recipe, train=replace(recipe.train, activations=mode))
        if largest_micro_batch(proposed, cluster) >= micro_batch:
            more = duration(proposed, cluster).arithmetic / before - 1
            return [f"set train.activations to {mode}: then {micro_batch} fits, for {more:.0%} more arithmetic"]
    return []


def _time_lines(recipe: Recipe, cluster: Cluster, micro_steps: int) -> list[str]:
    config, train, seq_len = recipe.phi1_config(), recipe.train, recipe.data.seq_len
    took, tokens = duration(recipe, cluster, micro_steps), train.batch_size * seq_len
    seconds = took.step * train.steps
    gpu_hours = seconds / 3600 * cluster.gpus
    return [
        f"a token        {config.flops_per_token(seq_len) / 1e9:.3f} GFLOP, "
        f"{config.flops_per_token(seq_len, causal=True) / 1e9:.3f} with causal attention halved",
        f"a step         {tokens:,} tokens, {took.arithmetic:.2f} s of arithmetic at MFU "
        f"{cluster.mfu:.2f} ({cluster.mfu_source}); collectives {took.collectives:.2f} s",
        f"speed          {tokens / took.step:,.0f} tokens/s, {tokens / took.step / cluster.gpus:,.0f} a GPU",
        f"the run        {train.steps:,} steps, {train.steps * tokens / 1e9:.2f} B tokens, {seconds / 86400:.2f} days, "
        f"{gpu_hours:,.0f} GPU-hours" + ("" if cluster.price is None else f", {gpu_hours * cluster.price:,.0f} at "
                                         f"{cluster.price:g} a GPU-hour"),
    ]


def _reconciliation(recipe: Recipe) -> list[str]:
    """Compare the tokens and the speed of a run of phi-1 with the published figures; empty for other runs."""
    tokens = recipe.train.steps * recipe.train.batch_size * recipe.data.seq_len
    if recipe.model.preset != "phi1" or tokens < 1e9:
        return []
    finetune = 6000 * 256 * 2048
    speed = CARD_TOKENS / (CARD_DAYS * 86400 * CARD_GPUS)
    paper = PAPER_TOKENS / (PAPER_GPU_HOURS * 3600)
    return [
        f"the card       54 B tokens: 24,000 x 1,024 x 2,048 = 50.33 B, and of finetuning 6,000 x 256 x 2,048 = "
        f"{finetune / 1e9:.2f} B, 53.48 B in all",
        f"               its 6 days on 8 A100 are {speed:,.0f} tokens/s a GPU; the paper's 770 GPU-hours for 51 B are "
        f"{paper:,.0f};",
        f"               taken as the time of all 36,000 steps of the schedule, {SCHEDULE_TOKENS / 1e9:.1f} B, "
        f"the 6 days are {speed * SCHEDULE_TOKENS / CARD_TOKENS:,.0f} as well",
    ]
