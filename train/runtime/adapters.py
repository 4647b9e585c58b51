"""Low-rank adapters (LoRA, arXiv 2106.09685) on the six projections of each block. All other weights are frozen.

    W' = W + alpha / rank * B A        A [rank, in], B [out, rank]; B starts at 0

The forward adds B A to the merged weights, so the operations are those of a model without adapters. The backward keeps
each block's W', and AdamW's states are those of A and B alone. Names and shapes are those of peft, apart from q_a for
`q_proj.lora_A.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from phi1 import Phi1, Phi1Config
from phi1.model import Block

MODULES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "fc1": "mlp.fc1",
           "dense": "self_attn.dense", "fc2": "mlp.fc2"}
"""Names in transformers' layers."""
_INTO, _OUT_OF = ("q", "k", "v", "fc1"), ("dense", "fc2")


class Adapters(nn.Module):
    """A and B of each projection of one block."""

    def __init__(self, config: Phi1Config, rank: int, alpha: float, device: torch.device) -> None:
        super().__init__()
        self.scale = alpha / rank
        for name, shape in shapes(config, rank).items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)))


class AdaptedBlock(Block):
    """A block that computes with its weights and the adapters' updates of them."""

    lora: Adapters

    def _parameters_in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        norm, norm_bias, into, into_bias, out_of, out_bias = super()._parameters_in_order()
        added = updates(dict(self.lora.named_parameters()), self.lora.scale)
        return norm, norm_bias, into + added["in_proj"], into_bias, out_of + added["out_proj"], out_bias


def shapes(config: Phi1Config, rank: int) -> dict[str, tuple[int, int]]:
    """Return the shapes of a block's adapters: NAME_a and NAME_b of each projection."""
    d, f = config.hidden_size, config.intermediate_size
    sizes = {name: (f if name == "fc1" else d, f if name == "fc2" else d) for name in MODULES}  # (out, in)
    return {f"{name}_{part}": (rank, columns) if part == "a" else (rows, rank)
            for name, (rows, columns) in sizes.items() for part in "ab"}


def updates(adapters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return what the adapters of a block add to the weights of `in_proj` [3D + F, D] and `out_proj` [D, D + F]."""
    of = {name: adapters[f"{name}_b"] @ (adapters[f"{name}_a"] * scale) for name in MODULES}
    return {"in_proj": torch.cat([of[name] for name in _INTO]),
            "out_proj": torch.cat([of[name] for name in _OUT_OF], dim=1)}


def adapt(model: Phi1, rank: int, alpha: float, seed: int) -> None:
    """Freeze a model and give each block adapters. A is uniform in +-1 / sqrt(in), as peft's; B is 0."""
    model.requires_grad_(False)
    device = model.embed.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    for block in model.blocks:
        assert isinstance(block, Block)
        lora = Adapters(model.config, rank, alpha, device)
        for name, parameter in lora.named_parameters():
            if name.endswith("_a"):
                bound = parameter.shape[1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound, generator=generator)
        block.lora = lora
        block.__class__ = AdaptedBlock


def adapted_weights(model: nn.Module) -> dict[str, tuple[Adapters, str]]:
    """Return, by the name of each weight that adapters update, the adapters and "in_proj" or "out_proj"."""
    return {f"{path}.{module}.weight": (block.lora, module) for path, block in model.named_modules()
            if isinstance(block, AdaptedBlock) for module in ("in_proj", "out_proj")}


def is_adapter(name: str) -> bool:
    """Return True for the name of an adapter's parameter in a model."""
    return ".lora." in name
