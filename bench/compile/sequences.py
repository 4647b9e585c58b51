"""A layer and a training step of phi-1 as sequences of launches: ours, transformers' eager one, and the best parts.

Everyone computes the same, in float16: forward and backward of B sequences of T tokens, without dropout; ours is
counted with it as well. A step has one micro-step and the optimizer, which is the same for all: gradients to float32,
their norm, fused AdamW over float32 master weights, the float16 copy. Which launches ours makes depends on the GPU: the
tile tables of some architectures leave products to cuBLAS, without what our kernels fuse into them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from phi1 import Phi1, Phi1Config, preset
from phi1.bench.harness.counting import Counter, Launch, counting
from phi1.bench.peers.hf_transformers import phi_config

BATCH, TOKENS = 8, 2048
HALF = torch.float16
OURS = ("phi1", "phi1 dropout")
PROVIDERS = (*OURS, "transformers", "liger+flash")
UNITS = ("layer forward", "layer forward+backward", "training step")


def sequence(provider: str, unit: str, batch: int = BATCH, tokens: int = TOKENS,
             config: Phi1Config | None = None, *, arch: str) -> list[Launch]:
    """The launches of one provider's unit.

    Args:
        provider: of PROVIDERS; "liger+flash" is Liger's norms and loss, flash-attention 2, and cuBLAS through PyTorch.
        unit: of UNITS.
        batch, tokens: B and T.
        config: the model's; phi-1's by default.
        arch: whose tiles ours takes, of `_tuned.ARCHITECTURES`; to others it is all the same.
    """
    rate = 0.1 if provider == "phi1 dropout" else 0.0
    config = replace(config or preset("phi1"), attention_dropout=rate, residual_dropout=rate)
    if unit != "training step":
        config = replace(config, num_hidden_layers=1)
    make = {"phi1": _ours, "phi1 dropout": _ours, "transformers": _transformers, "liger+flash": _composed}[provider]
    with counting(arch) as counter:
        ids = torch.empty(batch, tokens, dtype=torch.int64, device="meta")
        x = torch.empty(batch, tokens, config.hidden_size, dtype=HALF, device="meta", requires_grad=True)
        layer, loss, parameters = make(config, counter)
        begin = len(counter.launches)
        if unit == "layer forward":
            with torch.no_grad():
                layer(x)
        elif unit == "layer forward+backward":
            layer(x).backward(torch.empty_like(x))
        else:
            loss(ids).backward()
            _optimizer(parameters)
        return counter.launches[begin:]


Layer = Callable[[torch.Tensor], torch.Tensor]
Made = tuple[Layer, Layer, list[torch.nn.Parameter]]
"""(a layer over x, the loss of ids, all parameters)."""


def _optimizer(parameters: list[torch.nn.Parameter]) -> None:
    gradients = [parameter.grad.float() for parameter in parameters if parameter.grad is not None]
    torch._foreach_norm(gradients)
    master, mean, square = ([torch.empty_like(g) for g in gradients] for _ in range(3))
    step = [torch.empty((), device="meta") for _ in gradients]
    torch._fused_adamw_(master, gradients, mean, square, [], step, lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.1,
                        eps=1e-8, amsgrad=False, maximize=False)
    torch._foreach_copy_([parameter.data for parameter in parameters if parameter.grad is not None], master)


def _ours(config: Phi1Config, counter: Counter) -> Made:
    model = Phi1(config, device="meta", dtype=HALF)
    cos, sin = model.rotary_tables.unbind(0)
    rng = torch.empty(2, dtype=torch.int64, device="meta")

    def layer(x: torch.Tensor) -> torch.Tensor:
        # The model makes positions and sample ids once for all of its layers.
        sizes = x.shape[0] * x.shape[1], x.shape[0]
        positions, ids = (torch.empty(size, dtype=torch.int64, device="meta") for size in sizes)
        return model.blocks[0](x.flatten(0, 1), cos, sin, batch=x.shape[0], positions=positions, rng=rng,
                               sample_ids=ids).view(x.shape)

    def loss(ids: torch.Tensor) -> torch.Tensor:
        sample_ids = torch.empty(ids.shape[0], dtype=torch.int64, device="meta")
        return model.loss(ids, ids, rng=rng, sample_ids=sample_ids)

    return layer, loss, list(model.parameters())


def _transformers(config: Phi1Config, counter: Counter) -> Made:
    from transformers import PhiForCausalLM

    theirs = phi_config(config)
    theirs._attn_implementation = "eager"
    with torch.device("meta"):
        model: Any = PhiForCausalLM(theirs)
    model.to(HALF).train()

    def layer(x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[1]
        angles = tuple(torch.empty(1, tokens, config.rotary_dim, dtype=HALF, device="meta") for _ in range(2))
        mask = torch.empty(1, 1, tokens, tokens, dtype=HALF, device="meta")
        out = model.model.layers[0](x, attention_mask=mask, position_embeddings=angles)
        return out[0] if isinstance(out, tuple) else out

    def loss(ids: torch.Tensor) -> torch.Tensor:
        model.model.rotary_emb.to("meta")
        mask = torch.empty(1, 1, ids.shape[1], ids.shape[1], dtype=HALF, device="meta")
        return model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss

    return layer, loss, list(model.parameters())


def _composed(config: Phi1Config, counter: Counter) -> Made:
    """What someone would build of the best parts there are: three projections and fc1 as one product, rotary as
    transformers has it, for Liger's rotates whole heads alone."""
    model = Phi1(config, device="meta", dtype=HALF)
    norm, attend, linear_loss = _liger_norm(counter), _flash(counter), _liger_loss(counter)
    d, heads = config.hidden_size, config.num_attention_heads

    def turned(x: torch.Tensor) -> torch.Tensor:  # [B, T, H, K]
        r = config.rotary_dim
        angles = torch.empty(1, x.shape[1], 1, r, dtype=HALF, device="meta")
        a, b = x[..., :r], x[..., r:]
        half = torch.cat((-a[..., r // 2 :], a[..., : r // 2]), dim=-1)
        return torch.cat((a * angles + half * angles, b), dim=-1)

    def layer(x: torch.Tensor, block: Any = None) -> torch.Tensor:
        block = block or model.blocks[0]
        h = norm(x, block.norm.weight, block.norm.bias)
        merged = F.linear(h, block.in_proj.weight, block.in_proj.bias)
        q, k, v = merged[..., : 3 * d].unflatten(-1, (3, heads, config.head_dim)).unbind(2)
        att = attend(turned(q), turned(k), v).flatten(2)
        act = F.gelu(merged[..., 3 * d :], approximate="tanh")
        dense = F.linear(att, block.out_proj.weight[:, :d], block.out_proj.bias[0])
        return x + dense + F.linear(act, block.out_proj.weight[:, d:], block.out_proj.bias[1])

    def loss(ids: torch.Tensor) -> torch.Tensor:
        x = F.embedding(ids, model.embed.weight)
        for block in model.blocks:
            x = layer(x, block)
        h = norm(x, model.norm.weight, model.norm.bias).flatten(0, 1)
        return linear_loss(h, model.head.weight, model.head.bias)

    return layer, loss, list(model.parameters())


def _liger_norm(counter: Counter) -> Callable[..., torch.Tensor]:
    """Liger 0.8's LayerNorm: one kernel forward; one backward, which leaves partial sums that PyTorch adds up."""
    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            y = torch.empty_like(x)
            statistics = x.new_empty(2, x.shape[0] * x.shape[1])  # in the input's dtype
            counter.record("liger layer_norm forward", (x, weight, bias, y, statistics))
            ctx.save_for_backward(x, weight, statistics)
            return y

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
            x, weight, statistics = ctx.saved_tensors
            dx = torch.empty_like(x)
            partial = torch.empty(2, 132, weight.shape[0], dtype=torch.float32, device="meta")  # a row a multiprocessor
            counter.record("liger layer_norm backward", (dy, x, weight, statistics, dx, partial))
            return dx, partial[0].sum(0).to(weight.dtype), partial[1].sum(0).to(weight.dtype)

    return Norm.apply


def _flash(counter: Counter) -> Callable[..., torch.Tensor]:
    """flash-attention 2: one kernel forward; backward the row sums of dO O, five products with dQ added up in float32,
    and the conversion of dQ."""
    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out = torch.empty_like(q)
            lse = torch.empty(q.shape[:3], dtype=torch.float32, device="meta")
            counter.record("flash forward", (q, k, v, out, lse), 2.0 * q.numel() * k.shape[1])
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
            q, k, v, out, lse = ctx.saved_tensors
            dq, dk, dv, delta = (torch.empty_like(x) for x in (q, k, v, lse))
            sums = torch.empty(q.shape, dtype=torch.float32, device="meta")
            counter.record("flash backward dot", (dout, out, delta, sums))
            counter.record("flash backward", (dout, q, k, v, lse, delta, sums, dk, dv), 5.0 * q.numel() * k.shape[1])
            counter.record("flash backward convert", (sums, dq))
            return dq, dk, dv

    return Flash.apply


def _liger_loss(counter: Counter) -> Callable[..., torch.Tensor]:
    """Liger's fused linear cross-entropy: chunks of rows, of which the logits are made, turned into their gradient in
    place, and multiplied twice."""
    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            rows, (vocab, width) = x.shape[0], weight.shape
            chunk = 1 << (-(-rows // -(-vocab // width)) - 1).bit_length()
            dx, dw, db = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
            for first in range(0, rows, chunk):
                part = x[first : first + chunk]
                logits = torch.mm(part, weight.t()) + bias
                counter.record("liger cross_entropy", (logits,), again=2 * logits.numel())  # read, and written in place
                dx[first : first + chunk] = torch.mm(logits, weight)
                dw += torch.mm(logits.t(), part)
                db += logits.sum(0)
            ctx.save_for_backward(dx, dw, db)
            return torch.empty((), dtype=torch.float32, device="meta")

        @staticmethod
        def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
            return ctx.saved_tensors

    return Loss.apply
