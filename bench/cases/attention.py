"""attention and attention_qkv: lengths 512 to 16,384 at 16,384 tokens a call, head sizes 64, 80, 128, packed batches.

Flops count the half of the score matrix that a causal mask leaves, as FlashAttention's own benchmarks do, and five
products for the backward, whatever an implementation computes twice.
"""

from __future__ import annotations

from typing import Any

import torch

from phi1.bench.harness.case import Case, Function, Inputs, family
from phi1.bench.harness.inputs import Draw, dropout_of, with_sample
from phi1.bench.harness.providers import ours, part_of_reference
from phi1.bench.peers.attention import document_peers, packed_peers, peers
from phi1.kernels import attention, attention_qkv

TOKENS = 16384
# Read q, k, v, write out; then read them, out and dout, write dq, dk, dv. lse is float32.
FORWARD_BYTES, BACKWARD_BYTES = "4*B*T*H*K*e + 4*B*T*H", "8*B*T*H*K*e + 4*B*T*H"
PACKED_FORWARD_BYTES, PACKED_BACKWARD_BYTES = (formula.replace("B*T", "N") for formula in (FORWARD_BYTES,
                                                                                           BACKWARD_BYTES))
CHUNK_BYTES = 4 << 30  # of float64 scores that the reference may hold at once


def costs(pairs: str, forward_bytes: str, backward_bytes: str, alone: bool) -> dict[str, tuple[str, str]]:
    """Costs of `pairs` scores a head: two products of 2 K flops forward, five backward. `alone`: the backward too."""
    found = {"forward": (forward_bytes, f"4*H*K*{pairs}"), "backward": (backward_bytes, f"10*H*K*{pairs}"),
             "forward+backward": (f"{forward_bytes} + {backward_bytes}", f"14*H*K*{pairs}")}
    return {name: cost for name, cost in found.items() if name != "backward" or alone}


def cases() -> list[Case]:
    """Every case of these operations."""
    found: list[Case] = []
    for tokens in (512, 1024, 2048, 4096, 8192, 16384):
        found += _attention(TOKENS // tokens, tokens, 32, 64, quick=tokens in (2048, 16384))
    found += _attention(8, 2048, 32, 64, causal=False) + _attention(8, 2048, 32, 64, dtype="bfloat16")
    found += _attention(1, TOKENS, 32, 64, causal=False)  # as FlashAttention-3 was measured, arXiv 2407.08608
    found += _attention(8, 2048, 32, 80) + _attention(8, 2048, 16, 128) + _attention(8, 2048, 32, 64, p=0.1)
    found += _attention(2, 256, 4, 64, dtype="float32", device="cpu", quick=True)
    for tokens, rotary in ((2048, True), (2048, False), (8192, True)):
        found += _packed(TOKENS // tokens, tokens, 32, 64, rotary=rotary, quick=tokens == 2048 and rotary)
    found += _packed(8, 2048, 32, 64, p=0.1)
    found += _packed(1, TOKENS, 32, 64, packed=True, quick=True)
    for packed in (False, True):
        found += _packed(2, 256, 4, 64, dtype="float32", device="cpu", quick=True, packed=packed)
    return found


def _attention(batch: int, tokens: int, heads: int, size: int, *, causal: bool = True, p: float = 0.0,
               dtype: str = "float16", device: str = "cuda", quick: bool = False) -> list[Case]:
    shape = {"B": batch, "T": tokens, "H": heads, "K": size, "causal": causal} | ({"dropout": p} if p else {})

    def inputs(draw: Draw) -> Inputs:
        return {**{name: draw.normal(batch, tokens, heads, size) for name in "qkv"}, **draw.dropout(batch, p)}

    def run(inputs: Inputs) -> torch.Tensor:
        return attention(inputs["q"], inputs["k"], inputs["v"], causal=causal, dropout=dropout_of(inputs, p, 0))

    return family("attention", shape, dtype, device, inputs,
                  costs("B*T*T//2" if causal else "B*T*T", FORWARD_BYTES, BACKWARD_BYTES, alone=tokens == 2048),
                  leaves=("q", "k", "v"), providers=(ours(run), *peers(causal, p)), reference=_by_parts(causal, p),
                  quick=quick)


def _by_parts(causal: bool, p: float) -> Function:
    """The reference in parts that fit: sample by sample, and head by head if the dropout does not count heads."""
    part = part_of_reference(lambda q, k, v, dropout: attention(q, k, v, causal=causal, dropout=dropout))

    def run(inputs: Inputs) -> torch.Tensor:
        batch, tokens, heads, _ = inputs["q"].shape
        at_once = heads if p else max(1, min(heads, CHUNK_BYTES // (8 * tokens * tokens)))
        rows = []
        for b in range(batch):
            split = (inputs[name][b : b + 1].split(at_once, dim=2) for name in "qkv")
            dropout = dropout_of(with_sample(inputs, b), p, 0)
            rows.append(torch.cat([part(q, k, v, dropout) for q, k, v in zip(*split, strict=True)], dim=2))
        return torch.cat(rows)

    return run


def _packed(batch: int, tokens: int, heads: int, size: int, *, rotary: bool = True, p: float = 0.0,
            dtype: str = "float16", device: str = "cuda", quick: bool = False, packed: bool = False) -> list[Case]:
    """Samples of `tokens` rows each, or documents of their own lengths that fill the rows."""
    rows = batch * tokens
    lengths = document_lengths(rows) if packed else [tokens] * batch
    shape = {"N": rows, **({"documents": len(lengths)} if packed else {"T": tokens}), "H": heads, "K": size,
             **({"S": sum(n * n for n in lengths)} if packed else {"rotary": rotary}), **({"dropout": p} if p else {})}

    def inputs(draw: Draw) -> Inputs:
        cos, sin = draw.tables(max(lengths), size // 2) if rotary else (None, None)
        ends = {"cu_seqlens": torch.tensor([0, *lengths], device=draw.device).cumsum(0).int()} if packed else {}
        return {"qkv": draw.normal(rows, 3, heads, size), "cos": cos, "sin": sin, **ends, **draw.dropout(batch, p)}

    def angles(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (inputs["cos"], inputs["sin"]) if rotary else None

    def run(inputs: Inputs) -> torch.Tensor:
        split: dict[str, Any] = {"cu_seqlens": inputs["cu_seqlens"]} if packed else {"batch": batch}
        return attention_qkv(inputs["qkv"], rotary=angles(inputs), dropout=dropout_of(inputs, p, 0), **split)

    part = part_of_reference(lambda qkv, angles, dropout: attention_qkv(qkv, rotary=angles, dropout=dropout))

    def by_document(inputs: Inputs) -> torch.Tensor:
        return torch.cat([part(qkv, angles(inputs), dropout_of(with_sample(inputs, number), p, 0))
                          for number, qkv in enumerate(inputs["qkv"].split(lengths))])

    others = document_peers(lengths) if packed else packed_peers(batch, rotary, p)
    return family("attention_qkv", shape, dtype, device, inputs,
                  costs("S//2" if packed else "N*T//2", PACKED_FORWARD_BYTES, PACKED_BACKWARD_BYTES,
                        alone=tokens == 2048 and not packed),
                  leaves=("qkv",), providers=(ours(run), *others), reference=by_document, quick=quick)


def document_lengths(rows: int) -> list[int]:
    """Lengths of packed documents that fill `rows`: log-normal about 400 tokens like Python files, at most 2,048."""
    generator = torch.Generator().manual_seed(7)
    lengths: list[int] = []
    while sum(lengths) < rows:
        drawn = int(torch.empty(()).log_normal_(5.5, 1.0, generator=generator))
        lengths.append(max(1, min(drawn, 2048, rows - sum(lengths))))
    return lengths
