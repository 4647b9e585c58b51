"""linear_cross_entropy: the head and the loss, forward for evaluation and with all gradients for training."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from phi1.bench.harness.case import BOTH, Case, Function, Inputs, family
from phi1.bench.harness.inputs import Draw
from phi1.bench.harness.providers import compiled, ours, part_of_reference, peer, plain
from phi1.kernels import linear_cross_entropy

# Read x, W and the bias; then write dx, dW and db too. The logits, which need not touch memory, do not count.
COSTS = {"forward": ("(N*D + V*D + V)*e + 8*N", "2*N*D*V"),
         "forward+backward": ("2*(N*D + V*D + V)*e + 8*N", "6*N*D*V")}
REFERENCE_BYTES = 2 << 30  # of the float64 logits that the reference may hold at once


def cases() -> list[Case]:
    """Every case of this operation."""
    found: list[Case] = []
    for workspace in (256, 64):
        found += _loss(16384, 2048, 51200, "float16", "cuda", workspace=workspace, quick=workspace == 256)
    found += _loss(16384, 2048, 51200, "bfloat16", "cuda") + _loss(16384, 2048, 51200, "float16", "cuda", bias=False)
    return found + _loss(128, 256, 4096, "float32", "cpu", quick=True)


def _loss(rows: int, width: int, vocab: int, dtype: str, device: str, *, workspace: int = 256, bias: bool = True,
          quick: bool = False) -> list[Case]:
    shape = {"N": rows, "D": width, "V": vocab, "bias": bias, "workspace_mb": workspace}

    def inputs(draw: Draw) -> Inputs:
        return {"x": draw.normal(rows, width), "weight": draw.weight(vocab, width),
                "bias": draw.normal(vocab, scale=0.1) if bias else None, "targets": draw.integers(vocab, rows)}

    def run(inputs: Inputs) -> Any:
        return linear_cross_entropy(inputs["x"], inputs["weight"], inputs["bias"], inputs["targets"],
                                    workspace_mb=workspace)

    part = part_of_reference(lambda *tensors: linear_cross_entropy(*tensors, reduction="sum"))

    def by_rows(inputs: Inputs) -> torch.Tensor:
        chunk = max(1, REFERENCE_BYTES // (8 * vocab))
        parts = [part(x, inputs["weight"], inputs["bias"], targets)
                 for x, targets in zip(inputs["x"].split(chunk), inputs["targets"].split(chunk), strict=True)]
        return torch.stack(parts).sum() / rows

    # These peers have no bias.
    biasless = () if bias else (peer("cce", "cut-cross-entropy", _cce), peer("quack", "quack-kernels", _quack))
    return family(
        "linear_cross_entropy", shape, dtype, device, inputs, COSTS, leaves=("x", "weight", "bias"), reference=by_rows,
        providers=(ours(run), plain("torch", _eager), *compiled(_eager),
                   peer("F.linear_cross_entropy", "torch", _torch_fused, BOTH),
                   peer("liger", "liger-kernel", _liger), *biasless), quick=quick)


def _eager(inputs: Inputs) -> torch.Tensor:
    logits = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    return F.cross_entropy(logits.float(), inputs["targets"])


def _torch_fused(case: Case) -> Function:
    """torch's own, with its chunked strategy where it has one."""
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    strategy: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    extra = {} if strategy is None else {"options": strategy()}

    def run(inputs: Inputs) -> torch.Tensor:
        return F.linear_cross_entropy(inputs["x"], inputs["weight"], inputs["targets"], linear_bias=inputs["bias"],
                                      **extra)

    return run


def _liger(case: Case) -> Function:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def run(inputs: Inputs) -> torch.Tensor:
        out = LigerFusedLinearCrossEntropyFunction.apply(inputs["x"], inputs["weight"], inputs["targets"],
                                                         inputs["bias"])
        return out[0] if isinstance(out, tuple) else out

    return run


def _cce(case: Case) -> Function:
    from cut_cross_entropy import linear_cross_entropy as cce

    # Its default drops gradients below a threshold, which is faster and another function.
    return lambda inputs: cce(inputs["x"], inputs["weight"], inputs["targets"], filter_eps=None)


def _quack(case: Case) -> Function:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda inputs: chunked_linear_cross_entropy(inputs["x"], inputs["weight"], inputs["targets"])
