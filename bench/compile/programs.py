"""The computations whose launches the gate compiles: phi-1's own, the benchmarks', and variants that users can reach.

A program is run on tensors without values, so that its kernels are recorded and nothing is computed. The first program
that makes a launch gives the case its name. To have a kernel or one of its variants compiled, call it here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from phi1 import Phi1, Phi1Config, preset
from phi1.bench.cases.registry import select
from phi1.bench.harness.counting import run_inside
from phi1.cache import Cache
from phi1.kernels import (
    Dropout,
    add_layer_norm,
    attention_qkv,
    dropout_add,
    gelu,
    linear,
    linear_cross_entropy,
    mlp,
    parallel_block,
    rotary,
    rotary_,
)

Program = tuple[str, Callable[[], object]]
"""(name, what runs)."""
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BATCH, TOKENS, HEADS, RATE = 8, 2048, 32, 0.1
ROWS, WIDTH, INNER = BATCH * TOKENS, 2048, 8192


def units() -> Iterator[Program]:
    """phi-1's training step in every mode, its evaluation, a prefill and a decode step. Its layers launch alike, so one
    stands for all."""
    phi1 = replace(preset("phi1"), num_hidden_layers=1)
    for dtype in DTYPES:
        for mode in ("none", "mlp", "block"):
            for dropout in (False, True):
                name = " ".join(["train", dtype, *["dropout"] * dropout, *[f"recompute {mode}"] * (mode != "none")])
                yield name, partial(_train, phi1, dtype, mode, RATE * dropout)
        yield f"evaluate {dtype}", partial(_evaluate, phi1, dtype)
        yield f"generate {dtype}", partial(_generate, phi1, dtype, 1, False)
    yield "generate fp16 B=8", partial(_generate, phi1, "fp16", 8, False)
    yield "generate fp16 padded", partial(_generate, phi1, "fp16", 8, True)


def benchmarks() -> Iterator[Program]:
    """The operations of the benchmarks' registry at their shapes."""
    for case in select("cuda", (), ("kernel", "block")):
        yield case.name, partial(run_inside, case)


def variants() -> Iterator[Program]:
    """Calls that change a kernel's code and that phi-1 itself does not make."""
    yield from ((str(variant), variant) for variant in ATTENTIONS)
    for dtype in DTYPES:
        yield from _small(dtype)
    yield "rotary fp16 K=80", partial(_rotate, "fp16", 80, 32)  # phi-2's, whose rest is no power of two
    yield "rotary fp16 R=24", partial(_rotate, "fp16", 64, 24)
    for dtype in DTYPES:
        for rows in (ROWS, 512, 64):
            yield f"linear {dtype} N={rows}", partial(_linears, dtype, rows, WIDTH, INNER)
    yield "linear fp16 K=2080", partial(_linears, "fp16", ROWS, 2080, INNER)  # inputs that no block divides
    yield "linear fp16 odd sizes", partial(_linears, "fp16", 37, 77, 75)
    yield "linear fp16 transposed", _transposed
    for dtype in DTYPES:
        yield f"mlp {dtype}", partial(_mlp, dtype, ROWS, WIDTH, INNER)
    yield "mlp fp16 odd sizes", partial(_mlp, "fp16", 37, 75, 77)
    yield "loss fp16 V=50295", partial(_loss, "fp16", vocab=51_200, valid_vocab=50_295)
    yield "loss fp16 smoothed", partial(_loss, "fp16", vocab=51_200, label_smoothing=0.1, z_loss=1e-4)
    for dropout in (False, True):
        yield f"block fp16 packed{' dropout' * dropout}", partial(_block, "fp16", WIDTH, INNER, HEADS, True, dropout)
    for dtype in ("bf16", "fp32"):
        yield f"block {dtype} packed dropout", partial(_block, dtype, WIDTH, INNER, HEADS, True, True)
    yield "block fp16 D=96", partial(_block, "fp16", 96, 160, 3, False, False)  # divided by no tile


def _small(dtype: str) -> Iterator[Program]:
    """Operations that no product goes with, in phi-1's sizes, and in one size for each of the tables' other ranges."""
    yield f"elementwise {dtype}", partial(_elementwise, dtype)
    yield f"rotary {dtype}", partial(_rotate, dtype, 64, 32)
    yield f"loss {dtype}", partial(_loss, dtype, vocab=51_200)
    yield f"norm {dtype}", partial(_norm, dtype, WIDTH)
    if dtype == "fp16":
        for width in (256, 512, 1024, 2560, 8192):  # 2560: phi-2's, which needs a mask
            yield f"norm fp16 D={width}", partial(_norm, dtype, width)
        for size in (64, 256):
            yield f"rotary fp16 R={size}", partial(_rotate, dtype, max(128, size), size)
        yield "loss fp16 V=1024", partial(_loss, dtype, vocab=1024)


def others(arch: str) -> Iterator[Program]:
    """Programs of GPUs without rows of their own: phi-1's steps, and more of attention on NVIDIA's, which are many."""
    phi1 = replace(preset("phi1"), num_hidden_layers=1)
    for dtype in ("fp16", "fp32"):
        for dropout in (False, True):
            yield f"train {dtype}{' dropout' * dropout}", partial(_train, phi1, dtype, "none", RATE * dropout)
    yield "generate fp16", partial(_generate, phi1, "fp16", 1, False)
    yield "linear fp32", partial(_linears, "fp32", ROWS, WIDTH, INNER)
    more = OTHER_ATTENTIONS if arch == "sm_80" else (A(head_size=128), A("fp32", 128))
    yield from ((str(variant), variant) for variant in more)
    yield from _small("fp16")


def meta(*shape: int, dtype: str | torch.dtype = torch.int64, grad: bool = False) -> torch.Tensor:
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    return torch.empty(shape, dtype=kind, device="meta", requires_grad=grad)


def _dropout(given: bool, samples: int = BATCH) -> Dropout | None:
    return Dropout(RATE, meta(2), meta(samples), layer=1, kind=1) if given else None


def _backward(out: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outs, [torch.empty_like(x) for x in outs])


@cache
def _model(config: Phi1Config, dtype: str) -> Phi1:
    return Phi1(config, device="meta", dtype=DTYPES[dtype])


def _train(config: Phi1Config, dtype: str, mode: str, rate: float) -> None:
    model = _model(replace(config, attention_dropout=rate, residual_dropout=rate), dtype).train()
    model.zero_grad()
    model.recompute = mode
    ids = meta(BATCH, TOKENS)
    model.loss(ids, ids, reduction="sum", rng=meta(2), sample_ids=meta(BATCH)).backward()


@torch.no_grad()
def _evaluate(config: Phi1Config, dtype: str) -> None:
    ids = meta(BATCH, TOKENS)
    _model(config, dtype).eval().loss(ids, ids, reduction="sum")


@torch.no_grad()
def _generate(config: Phi1Config, dtype: str, batch: int, padded: bool) -> None:
    model, kept = _model(config, dtype).eval(), Cache(config, batch, TOKENS, device="meta", dtype=DTYPES[dtype])
    for tokens in (512, 1):
        model(meta(batch, tokens), cache=kept, logits_to_keep=1)
        kept.starts = meta(batch, dtype=torch.int32) if padded else None


@dataclass(frozen=True)
class Attention:
    """Everything that changes the code of attention's kernels, except the tile. rotary: "", "inside" or "applied"."""

    dtype: str = "fp16"
    head_size: int = 64
    rotary: str = "applied"
    rotary_size: int = 32
    dropout: bool = False
    packed: bool = False
    padded: bool = False
    causal: bool = True

    def __str__(self) -> str:
        flags = [name for name in ("dropout", "packed", "padded") if getattr(self, name)]
        flags += [f"rotary {self.rotary}"] if self.rotary else []
        flags += [f"R={self.rotary_size}"] if self.rotary_size != 32 else []
        return " ".join(["attention", self.dtype, f"K={self.head_size}", *flags, *["full"] * (not self.causal)])

    def __call__(self) -> None:
        qkv = meta(ROWS, 3, HEADS, self.head_size, dtype=self.dtype, grad=True)
        cos, sin = (meta(TOKENS, self.rotary_size // 2, dtype="fp32") for _ in range(2))
        rotates = bool(self.rotary)
        _backward(attention_qkv(
            qkv, batch=None if self.packed else BATCH, causal=self.causal, rotary=(cos, sin) if rotates else None,
            cu_seqlens=meta(BATCH + 1, dtype=torch.int32) if self.packed else None,
            positions=meta(ROWS) if rotates else None, rotary_applied=self.rotary == "applied",
            seq_starts=meta(BATCH, dtype=torch.int32) if self.padded else None, dropout=_dropout(self.dropout)))


A = Attention
ATTENTIONS = (
    *(A(dtype, dropout=dropout) for dtype in ("fp16", "bf16") for dropout in (False, True)),
    A(rotary="inside"),
    A(rotary="inside", rotary_size=24),  # no power of two
    A(rotary="", causal=False),
    A(rotary="", packed=True),
    *(A(packed=True, dropout=dropout) for dropout in (False, True)),
    *(A(dtype, rotary="inside", dropout=True) for dtype in ("fp16", "bf16")),
    A(rotary="inside", packed=True, dropout=True),
    A(rotary="", padded=True),
    A(head_size=80, rotary="inside", dropout=True),
    *(A(head_size=128, rotary="", dropout=dropout) for dropout in (False, True)),
    *(A("fp32", head_size) for head_size in (64, 128)),
    *(A("fp32", head_size, dropout=True) for head_size in (64, 80, 128)),
    *(A("fp32", head_size, rotary="inside", packed=packed, dropout=True)
      for head_size in (80, 128) for packed in (False, True)),
    A("fp32", 128, rotary="inside", dropout=True, padded=True),
    A(rotary="inside", packed=True),
    *(A(rotary="inside", packed=packed, causal=False) for packed in (False, True)),
)
OTHER_ATTENTIONS = (
    *(A(packed=packed, dropout=dropout) for packed in (False, True) for dropout in (False, True)),
    A("bf16", rotary="inside"),
    *(A(rotary="inside", packed=packed, dropout=True) for packed in (False, True)),
    *(A(head_size=128, dropout=dropout) for dropout in (False, True)),
    *(A("fp32", 128, rotary=rotary, dropout=True) for rotary in ("applied", "inside")),
)


def _elementwise(dtype: str) -> None:
    x, weight, bias = (meta(*shape, dtype=dtype, grad=True) for shape in ((ROWS, WIDTH), (INNER, WIDTH), (INNER,)))
    _backward(gelu(x))
    _backward(linear(x, weight, bias, activation="gelu_new"))
    _backward(linear(x, weight, bias, activation="gelu_new", dropout=_dropout(True)))
    _backward(gelu(meta(ROWS, 3 * WIDTH + INNER, dtype=dtype)[:, 3 * WIDTH :].requires_grad_()))
    for dropout in (False, True):
        _backward(dropout_add(x, meta(ROWS, WIDTH, dtype=dtype, grad=True), _dropout(dropout)))


def _norm(dtype: str, width: int) -> None:
    x, residual = (meta(ROWS, width, dtype=dtype, grad=True) for _ in range(2))
    weight, bias = (meta(width, dtype=dtype, grad=True) for _ in range(2))
    _backward(add_layer_norm(x, residual, weight, bias))


def _rotate(dtype: str, head_size: int, rotary_size: int) -> None:
    cos, sin = (meta(TOKENS, rotary_size // 2, dtype="fp32") for _ in range(2))
    x = meta(ROWS, 3, HEADS, head_size, dtype=dtype)
    rotary(x, cos, sin, meta(ROWS))
    rotary_(x, cos, sin, meta(ROWS))


def _linears(dtype: str, rows: int, width: int, inner: int) -> None:
    """fc1 with its activation; fc2 with each epilogue."""
    x, act, residual = (meta(rows, size, dtype=dtype) for size in (width, inner, width))
    (w1, b1), (w2, b2) = ((meta(a, b, dtype=dtype), meta(a, dtype=dtype)) for a, b in ((inner, width), (width, inner)))
    linear(x, w1, b1, activation="gelu_new")
    linear(act, w2, b2)
    linear(act, w2, b2, residual=residual)
    _backward(linear(act.requires_grad_(), w2.requires_grad_(), b2.requires_grad_(), residual=residual,
                     dropout=_dropout(True, 1)))


def _transposed() -> None:
    """Operands that TMA cannot take."""
    x, weight, bias = meta(WIDTH, ROWS, dtype="fp16").t(), meta(INNER, WIDTH, dtype="fp16"), meta(INNER, dtype="fp16")
    linear(x, weight, bias, activation="gelu_new")
    linear(x, weight, bias, residual=meta(ROWS, INNER, dtype="fp16"), dropout=_dropout(True))


def _mlp(dtype: str, rows: int, width: int, inner: int) -> None:
    shapes = ((rows, width), (inner, width), (inner,), (width, inner), (width,))
    _backward(mlp(*(meta(*shape, dtype=dtype, grad=True) for shape in shapes)))


def _loss(dtype: str, vocab: int, **rule: Any) -> None:
    x, weight, bias = (meta(*shape, dtype=dtype, grad=True) for shape in ((ROWS, WIDTH), (vocab, WIDTH), (vocab,)))
    _backward(linear_cross_entropy(x, weight, bias, meta(ROWS), **rule))


def _block(dtype: str, width: int, inner: int, heads: int, packed: bool, dropout: bool) -> None:
    half = width // heads // 4
    shapes = ((ROWS, width), (width,), (width,), (3 * width + inner, width), (3 * width + inner,),
              (width, width + inner), (2, width))
    drops = (_dropout(dropout),) * 3
    given = {"cu_seqlens": meta(BATCH + 1, dtype=torch.int32)} if packed else {"batch": BATCH}
    _backward(parallel_block(
        *(meta(*shape, dtype=dtype, grad=True) for shape in shapes),
        *(meta(TOKENS, half, dtype="fp32") for _ in range(2)), n_heads=heads, positions=meta(ROWS),
        dropouts=drops, **given))
