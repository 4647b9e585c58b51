"""Attention's peers: SDPA with each backend forced by name, FlexAttention, flash-attn 2 and 4.

All take and return [B, T, H, K]; the transposed views that some of them need cost nothing. A peer that draws dropout
masks of its own is timed and not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from phi1.bench.harness.case import Case, Function, Inputs, Provider
from phi1.bench.harness.providers import compiled, peer, plain
from phi1.bench.peers.pointwise import torch_rotary

BACKENDS = {"sdpa-flash": "FLASH_ATTENTION", "sdpa-cudnn": "CUDNN_ATTENTION", "sdpa-efficient": "EFFICIENT_ATTENTION",
            "sdpa-math": "MATH"}
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""q, k, v [B, T, H, K] -> out [B, T, H, K]."""


def sdpa(causal: bool, p: float) -> Attend:
    """torch's scaled_dot_product_attention, with its own choice of backend or the one that `forced` allows."""
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal,
                                             dropout_p=p)
        return out.transpose(1, 2)

    return attend


def forced(function: Callable[..., torch.Tensor], backend: str) -> Callable[..., torch.Tensor]:
    """The function with one backend of SDPA allowed; it raises if that backend cannot run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kind = getattr(SDPBackend, backend)

    def run(*arguments: Any) -> torch.Tensor:
        with sdpa_kernel(kind):
            return function(*arguments)

    return run


def flex(case: Case, device: torch.device, causal: bool, tokens: int, documents: Sequence[int] = ()) -> Attend:
    """FlexAttention, compiled for its best tiles. The block mask is made here, once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    numbers = torch.repeat_interleave(torch.arange(len(documents), device=device),
                                      torch.tensor(documents, device=device)) if documents else None

    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (numbers[query] == numbers[key]) if numbers is not None else query >= key

    mask = create_block_mask(seen, None, None, tokens, tokens, device=str(device)) if causal or documents else None
    compiled_flex = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = compiled_flex(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask)
        return out.transpose(1, 2)

    return attend


def flash_attn(causal: bool, p: float) -> Attend:
    """flash-attn 2's own function."""
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, dropout_p=p, causal=causal)


def flash_attn_4(causal: bool) -> Attend:
    """flash-attn 4's function; some releases return the lse as well."""
    from flash_attn.cute import flash_attn_func

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = flash_attn_func(q, k, v, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return attend


def _of_qkv(attend: Attend) -> Function:
    return lambda inputs: attend(inputs["q"], inputs["k"], inputs["v"])


def peers(causal: bool, p: float) -> tuple[Provider, ...]:
    """Peers of `attention`."""
    return plain("torch", _of_qkv(sdpa(causal, p)), comparable=not p), *_attention_peers(_of_qkv, causal, p)


def _attention_peers(wrap: Callable[[Attend], Function], causal: bool, p: float) -> list[Provider]:
    """SDPA's backends, flash-attn, and without dropout FlexAttention and flash-attn 4, which have none."""
    def one_backend(name: str, backend: str) -> Provider:
        return Provider(name, lambda case, device: wrap(forced(sdpa(causal, p), backend)), devices=("cuda",),
                        by_default=("cuda",), comparable=not p)

    found = [*(one_backend(name, backend) for name, backend in BACKENDS.items()),
             peer("flash-attn", "flash-attn", lambda case: wrap(flash_attn(causal, p)), comparable=not p)]
    if not p:
        found += [Provider("flex", lambda case, device: wrap(flex(case, device, causal, case.shape["T"])),
                           by_default=("cuda",), slow=True),
                  peer("flash-attn-4", "flash-attn-4", lambda case: wrap(flash_attn_4(causal)))]
    return found


def packed_peers(batch: int, rotary: bool, p: float) -> tuple[Provider, ...]:
    """Peers of `attention_qkv`: rotary in PyTorch, then attention on views of q, k and v."""
    def wrap(attend: Attend) -> Function:
        def run(inputs: Inputs) -> torch.Tensor:
            qkv = inputs["qkv"]
            if rotary:
                positions = torch.arange(qkv.shape[0] // batch, device=qkv.device).repeat(batch)
                qkv = torch_rotary(qkv, inputs["cos"], inputs["sin"], positions)
            q, k, v = qkv.unflatten(0, (batch, -1)).unbind(2)  # [B, T, H, K] each
            return attend(q, k, v).reshape(qkv.shape[0], -1)

        return run

    eager = wrap(sdpa(True, p))
    return (plain("torch", eager, comparable=not p), *compiled(eager, comparable=not p),
            *_attention_peers(wrap, True, p))


def document_peers(lengths: list[int]) -> tuple[Provider, ...]:
    """Peers for packed documents: a loop, FlexAttention's document mask, flash-attn's variable lengths."""
    def one_by_one(inputs: Inputs) -> torch.Tensor:
        rotated = _rotated(inputs, lengths)
        parts = [sdpa(True, 0.0)(*part[None].unbind(2))[0] for part in rotated.split(lengths)]
        return torch.cat(parts).flatten(1)

    def masked(case: Case, device: torch.device) -> Function:
        attend = flex(case, device, True, sum(lengths), lengths)
        return lambda inputs: attend(*_rotated(inputs, lengths)[None].unbind(2))[0].flatten(1)

    def variable(case: Case) -> Function:
        from flash_attn import flash_attn_varlen_qkvpacked_func

        longest = max(lengths)
        return lambda inputs: flash_attn_varlen_qkvpacked_func(_rotated(inputs, lengths), inputs["cu_seqlens"], longest,
                                                               causal=True).flatten(1)

    def variable_4(case: Case) -> Function:
        from flash_attn.cute import flash_attn_varlen_func

        def run(inputs: Inputs) -> torch.Tensor:
            q, k, v = _rotated(inputs, lengths).unbind(1)
            ends = inputs["cu_seqlens"]
            out = flash_attn_varlen_func(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=max(lengths),
                                         max_seqlen_k=max(lengths), causal=True)
            return (out[0] if isinstance(out, tuple) else out).flatten(1)

        return run

    return (plain("torch", one_by_one), Provider("flex", masked, by_default=("cuda",), slow=True),
            peer("flash-attn", "flash-attn", variable), peer("flash-attn-4", "flash-attn-4", variable_4))


def _rotated(inputs: Inputs, lengths: list[int]) -> torch.Tensor:
    qkv, ends = inputs["qkv"], inputs["cu_seqlens"].long()
    counts = ends[1:] - ends[:-1]
    starts = torch.repeat_interleave(ends[:-1], counts, output_size=sum(lengths))
    positions = torch.arange(sum(lengths), device=qkv.device) - starts
    return torch_rotary(qkv, inputs["cos"], inputs["sin"], positions)
