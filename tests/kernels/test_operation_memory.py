"""Bytes that each operation keeps for its backward and takes as workspace, against formulas.

Kept is what autograd holds that no argument holds; an output may be among it. Workspace is the most that was held at
once on the way beyond what is held in the end. N rows, D width, F MLP width, M outputs, H heads, K head size,
V vocabulary, e bytes of an element.
"""

import gc

import pytest
import torch
from allocations import Allocations
from kernel_checks import DTYPES, block_inputs, kept_bytes, kernel_device, rotary_tables

from phi1 import kernels
from phi1.kernels import Dropout, backend
from phi1.kernels.block import bias_grad_triton
from phi1.kernels.core import tiles

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

N, D, F, M, H, K, V, E = 40, 64, 96, 48, 2, 32, 300, 2
MASK = Dropout(0.3, torch.tensor([5, 7], device=DEVICE), torch.tensor([1, 2], device=DEVICE))
CONSTANTS = {"cos": torch.rand(N, 8, device=DEVICE), "sin": torch.rand(N, 8, device=DEVICE),
             "positions": torch.arange(N, device=DEVICE)}
TILE = {"block_m": 16, "block_n": 64, "block_k": 16, "group_m": 2, "parts": 1, "tma": 0, "num_warps": 4,
        "num_stages": 2}
NORM_TILE = {"rows": 4, "stages": 1, "num_warps": 4}
PARTIALS = 4 * 2 * D * (N // NORM_TILE["rows"])  # of dweight and dbias
SMALL = 512  # bytes: counts and bias gradients of so few rows

NORM = {"weight": (D,), "bias": (D,)}
LINEAR = {"x": (N, D), "weight": (M, D), "bias": (M,)}
MLP = {"x": (N, D), "w1": (F, D), "b1": (F,), "w2": (D, F), "b2": (D,)}
HEADS = dict.fromkeys("qkv", (2, N // 2, H, K))
OPERATIONS = {  # operation, shapes, options, then bytes: kept, workspace of the forward, of the backward
    "layer_norm": ("layer_norm", {"x": (N, D), **NORM}, {}, 8 * N, 0, PARTIALS),
    "add_layer_norm": ("add_layer_norm", {"x": (N, D), "residual": (N, D), **NORM}, {}, N * D * E + 8 * N, 0, PARTIALS),
    "rotary": ("rotary", {"x": (N, 3, H, K)}, CONSTANTS, 0, 0, 0),
    "attention": ("attention", HEADS, {"dropout": MASK}, N * H * K * E + 4 * N * H, 0, 4 * N * H),
    "attention_qkv": ("attention_qkv", {"qkv": (N, 3, H, K)}, {"batch": 2}, N * H * K * E + 4 * N * H, 0, 4 * N * H),
    "gelu": ("gelu", {"x": (N, F)}, {}, 0, 0, 0),
    "dropout_add": ("dropout_add", {"x": (N, D), "residual": (N, D)}, {"dropout": MASK}, 0, 0, 0),
    "linear": ("linear", LINEAR, {}, 0, 0, 0),
    "linear, gelu_new": ("linear", LINEAR, {"activation": "gelu_new"}, N * M * E, 0, N * M * E),
    "linear, residual": ("linear", LINEAR | {"residual": (N, M)}, {}, 0, 0, 0),
    "linear, dropout, residual": ("linear", LINEAR | {"residual": (N, M)}, {"dropout": MASK}, 0, 0, N * M * E),
    "mlp": ("mlp", MLP, {}, N * F * E, N * F * E, 2 * N * F * E),
}


def draw(shapes, dtype=torch.float16):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()
            for name, shape in shapes.items()}


def measure(operation, tensors, constants=CONSTANTS, **options):
    """(bytes kept, workspace of the forward, workspace of the backward)."""
    given = [*tensors.values(), *constants.values(), MASK.rng, MASK.sample_ids]
    gc.freeze()  # the collections below leave aside what is there already: a tenth of a second each time
    with backend("triton"):
        with kept_bytes(given) as kept, Allocations(given) as forward:
            outputs = operation(**tensors, **options)
        in_forward = forward.workspace
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.ones_like(out) for out in outputs]
        with Allocations([*given, *outputs, *upstream]) as backward:
            backward.seen.update(kept)
            gradients = torch.autograd.grad(outputs, [x for x in tensors.values() if x.requires_grad], upstream)
        in_backward = backward.workspace
    gc.unfreeze()
    assert all(x is not None for x in gradients)
    return sum(kept.values()), in_forward, in_backward


@pytest.mark.parametrize("name", OPERATIONS)
def test_bytes_kept_and_workspace(name):
    operation, shapes, options, kept, *workspaces = OPERATIONS[name]
    with tiles.forced("linear", "forward", TILE), tiles.forced("mlp", "dgelu", TILE), \
            tiles.forced("layer_norm", "backward", NORM_TILE):
        found, *measured = measure(getattr(kernels, operation), draw(shapes), **options)
    assert found == kept
    for workspace, expected in zip(measured, workspaces, strict=True):
        assert expected <= workspace <= expected + SMALL


@pytest.mark.parametrize(("rate", "recompute"), [(0.0, "none"), (0.0, "mlp"), (0.3, "block")])
def test_parallel_block_keeps_to_its_workspace(monkeypatch, rate, recompute):
    """Rows enough to outweigh the weights' gradients, which come after the backward holds most: when act is there."""
    n_rows, width, inner, partials = 192, 32, 128, 3
    monkeypatch.setattr(bias_grad_triton, "MAX_PARTIALS", partials)
    tensors = {name: x.requires_grad_() for name, x in
               block_inputs((2, n_rows // 2, width, H, inner), torch.float16).items()}
    rotary = {**dict(zip(("cos", "sin"), rotary_tables(8), strict=True)),
              "positions": torch.arange(n_rows // 2, device=DEVICE).repeat(2)}
    dropouts = tuple(Dropout(rate, MASK.rng, MASK.sample_ids, kind=kind) if rate else None for kind in range(3))
    tile = TILE | {"block_m": 64}
    with tiles.forced("mlp", "dgelu", tile), tiles.forced("layer_norm", "backward", NORM_TILE):
        found, forward, backward = measure(kernels.parallel_block, tensors, rotary, **rotary, n_heads=H, batch=2,
                                           dropouts=dropouts, recompute=recompute)
    rows, pre, lse = n_rows * width * E, n_rows * inner * E, 4 * n_rows * H  # rows: [N, D] once
    kept = {"none": 4 * rows + lse + pre, "mlp": 4 * rows + lse, "block": 0}[recompute]
    assert found == kept
    not_kept = 4 * rows + lse - min(kept, 4 * rows + lse)
    expected = rows + pre + (rows if rate else 0) + not_kept  # h, act, the dense branch
    assert expected <= forward <= expected + SMALL
    sums = 4 * (n_rows // tile["block_m"] * inner + (2 * partials * width if rate else 0))
    expected = 3 * rows + 2 * pre + (2 * rows if rate else 0) + (4 * rows + lse + pre - kept) + sums
    later = sum(x.numel() * E for name, x in tensors.items() if name not in ("x", "out_weight"))
    assert expected <= backward + later <= expected + SMALL + 8 * n_rows  # the norm's statistics


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy_keeps_to_its_workspace(reduction):
    """Two chunks of rows; float32, of which PyTorch's products make no copies on a CPU."""
    n_rows, vocab, workspace = 70, 4000, 1 << 20
    tensors = draw({"x": (n_rows, 8), "weight": (vocab, 8), "bias": (vocab,)}, torch.float32)
    tensors["targets"] = torch.randint(vocab, (n_rows,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with tiles.forced("linear_cross_entropy", "rows", {"block": 4096, "num_warps": 8}):
        kept, forward, backward = measure(kernels.linear_cross_entropy, tensors, workspace_mb=1, reduction=reduction)
    gradients, rows = 4 * (8 * (n_rows + vocab) + vocab), 16 * n_rows
    assert kept == (gradients if reduction == "mean" else 0)
    logits = 4 * 4096 * 64  # 64 rows of 32 times 128 columns: all of the workspace
    if reduction == "mean":
        assert logits <= forward <= workspace + rows
        assert backward <= SMALL
    else:  # the logits are made again, and gradients that are yet to be scaled
        assert forward <= workspace + rows
        assert backward <= workspace + gradients + rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy_keeps_the_gradients_alone(dtype):
    """Float16's in float32."""
    tensors = draw({"x": (N, D), "weight": (V, D), "bias": (V,)}, dtype)
    kept, _, _ = measure(kernels.linear_cross_entropy, tensors, targets=torch.arange(N, device=DEVICE))
    assert kept - 8 * N == (4 if dtype == torch.float16 else dtype.itemsize) * D * (N + V) + 4 * V
