"""The kernels of every operation but attention broken on purpose, one text at a time.

The comparison with the reference must notice each break. Attention's: test_attention_mutations.py.
"""

import functools

import pytest
import torch
from kernel_checks import block_inputs, kernel_device, rotary_tables
from mutations import Case, Mutant, mutation_tests

from phi1.kernels import (
    Dropout,
    add_layer_norm,
    dropout_add,
    gelu,
    linear,
    linear_cross_entropy,
    mlp,
    parallel_block,
)
from phi1.kernels.block.parallel_block import parallel_block_reference
from phi1.kernels.cross_entropy.linear_cross_entropy import linear_cross_entropy_reference
from phi1.kernels.gemm.linear import linear_reference
from phi1.kernels.gemm.mlp import mlp_reference
from phi1.kernels.pointwise.dropout import dropout_add_reference
from phi1.kernels.pointwise.gelu import gelu_reference
from phi1.kernels.pointwise.layer_norm import add_layer_norm_reference

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

# In the order of their imports.
FILES = ("core/sums", "gelu", "dropout", "matmul", "tma", "epilogue", "linear", "mlp", "layer_norm", "loss",
         "bias_grad", "projections", "block/launch")
RNG = torch.tensor([5, 7], device=DEVICE)
TILE = {"block_m": 16, "block_n": 64, "block_k": 16, "group_m": 2, "parts": 1, "tma": 0, "num_warps": 4,
        "num_stages": 2}
ROWS = {"rows": 2, "cols": 64, "num_warps": 4}
TILES = {  # the operation and kernel of the tables -> what every check forces, unless it says otherwise
    ("linear", "forward"): TILE,
    ("mlp", "dgelu"): TILE,
    ("block", "in_proj"): TILE,
    ("block", "out_proj"): TILE,
    ("epilogue", "forward"): ROWS,
    ("epilogue", "backward"): ROWS,
    ("layer_norm", "forward"): {"rows": 2, "num_warps": 4},
    ("layer_norm", "backward"): {"rows": 2, "stages": 1, "num_warps": 4},
    ("linear_cross_entropy", "rows"): {"block": 64, "num_warps": 2},
}
SMALL = {("layer_norm", "MAX_PARTIALS"): 3, ("epilogue", "MAX_PARTIALS"): 3,
         ("bias_grad", "MAX_PARTIALS"): 3, ("bias_grad", "SUM_ROWS"): 2,
         ("loss", "chunk_rows"): lambda *_: 4, ("matmul", "multiprocessors"): lambda device: 2}
"""Sizes that few rows go over: sums of several groups of rows, several chunks, several tiles a program."""

BY_GROUPS = "for first in range(pid_p * ROWS, n_rows, n_partials * ROWS"
MUTANTS = {  # file, text, its replacement, how often it occurs, the check that notices
    "no eps": Mutant("layer_norm", "/ D + eps)", "/ D)", 1, "norm"),
    "mean over the block": Mutant("layer_norm", "tl.sum(h, axis=1) / D", "tl.sum(h, axis=1) / BLOCK_D", 1, "norm"),
    "variance of masked columns": Mutant("layer_norm", "tl.where(mask_d[None, :], h - mean[:, None], 0.0)",
                                         "h - mean[:, None]", 1, "norm"),
    "norm without bias": Mutant("layer_norm", " + bias[None, :]", "", 1, "norm"),
    "residual subtracted": Mutant("layer_norm", "h += tl.load(residual_ptr", "h -= tl.load(residual_ptr", 1, "norm"),
    "norm's last row": Mutant("layer_norm", "mask_n, mask_d = offs_n < n_rows,",
                              "mask_n, mask_d = offs_n < n_rows - 1,", 1, "norm"),
    "dx without mean of g": Mutant("layer_norm", "g - mean_g[:, None] - x_hat", "g - x_hat", 1, "norm"),
    "dx's sign": Mutant("layer_norm", "- x_hat * mean_gx", "+ x_hat * mean_gx", 1, "norm"),
    "dx without rstd": Mutant("layer_norm", "dx = rstd[:, None] * (", "dx = (", 1, "norm"),
    "dx without the residual's": Mutant("layer_norm", "dx += tl.load(dresidual_ptr", "dx += 0 * tl.load(dresidual_ptr",
                                        1, "norm"),
    "dw of dy": Mutant("layer_norm", "dw += tl.sum(dy * x_hat", "dw += tl.sum(dy", 1, "norm"),
    "dw of the last rows alone": Mutant("layer_norm", "dw += tl.sum(dy * x_hat", "dw = tl.sum(dy * x_hat", 1, "norm"),
    "groups of rows left out": Mutant("layer_norm", "n_partials * ROWS, num", "n_partials * ROWS * 2, num", 1, "norm"),
    "one gradient for both": Mutant("layer_norm", "tl.program_id(1) == 0", "tl.program_id(1) < 2", 1, "norm"),
    "a partial sum left out": Mutant("core/sums", "(offs_n < n_rows)", "(offs_n < n_rows - 1)", 1, "norm"),
    "gelu's cube": Mutant("gelu", "x * tl.sigmoid(x * (x * x * CUBIC", "x * tl.sigmoid(x * (x * CUBIC", 1, "gelu"),
    "slope's square": Mutant("gelu", "constexpr(3 * constants.GELU_CUBIC)", "constexpr(2 * constants.GELU_CUBIC)", 1,
                             "gelu"),
    "slope's sign": Mutant("gelu", "(1.0 - s)", "(1.0 + s)", 1, "gelu"),
    "slope left out": Mutant("epilogue", "dpre *= slope", "dpre *= 1.0", 1, "gelu"),
    "slope for act": Mutant("epilogue", "tl.store(act_ptr + offs, act", "tl.store(act_ptr + offs, slope", 1,
                            "mlp, cublas"),
    "db of the last rows alone": Mutant("epilogue", "db += dpre", "db = dpre", 1, "linear"),
    "one partial row for all": Mutant("epilogue", "db_partial_ptr + pid_p.to(tl.int64) * n_cols", "db_partial_ptr", 1,
                                      "linear"),
    "epilogue's residual": Mutant("epilogue", "out += tl.load(", "out -= tl.load(", 1, "dropout"),
    "dropout's scale": Mutant("dropout", "x * scale, 0.0", "x, 0.0", 1, "dropout"),
    "the other half dropped": Mutant("dropout", "tl.where(keep, x * scale, 0.0)", "tl.where(keep, 0.0, x * scale)", 1,
                                     "dropout"),
    "dropout's kind": Mutant("dropout", "dropout.kind << 12", "dropout.kind << 11", 1, "dropout"),
    "dropout's layer": Mutant("dropout", "dropout.layer << 16", "dropout.layer << 15", 1, "dropout"),
    "bias subtracted": Mutant("linear", "acc += tl.load(bias_ptr", "acc -= tl.load(bias_ptr", 1, "linear"),
    "no activation": Mutant("linear", "acc = gelu_new(pre.to(tl.float32))", "acc = pre.to(tl.float32)", 1, "linear"),
    "linear's residual": Mutant("linear", "acc += residual", "acc -= residual", 1, "linear"),
    "residual's stride": Mutant("linear", "first_row * stride_residual_n", "first_row * n_outputs", 1, "linear"),
    "linear's last row": Mutant("linear", "offs_n < n_rows - first_row", "offs_n < n_rows - first_row - 1", 1,
                                "linear"),
    "halves swapped": Mutant("linear", "+ i * (BLOCK_N // PARTS)", "+ (1 - i) * (BLOCK_N // PARTS)", 1,
                             "linear, halves"),
    "last input left out": Mutant("matmul", "offs_k < n_inner - first", "offs_k < n_inner - first - 1", 1, "linear"),
    "every tile the next one's rows": Mutant("matmul", "((pid * BLOCK", "((pid * BLOCK + 1", 1, "linear"),
    "a group of fewer rows": Mutant("matmul", "within // rows", "within // GROUP_M", 1, "linear"),
    "tiles left out": Mutant("matmul", "tl.num_programs(0)\n", "tl.num_programs(0) + 1\n", 1, "linear, persistent"),
    "the last tile left out": Mutant("matmul", "tl.cdiv(n_cols, BLOCK_N), tl.num",
                                     "tl.cdiv(n_cols, BLOCK_N) - 1, tl.num", 1, "linear, persistent"),
    "quarters out of order": Mutant("matmul", "(a, b, c, d)", "(a, c, b, d)", 1, "mlp"),
    "TMA stands still": Mutant("tma", "b_desc.load([first, first_col])", "b_desc.load([0, first_col])", 1, "mlp, tma"),
    "TMA's row": Mutant("tma", "b_desc.load([first_col, first_inner", "b_desc.load([first_col + 1, first_inner", 1,
                        "linear, tma"),
    "act for slope": Mutant("mlp", "act, slope = gelu", "slope, act = gelu", 1, "mlp"),
    "rows past the end in db1": Mutant("mlp", "tl.where(mask_n[:, None], dact * slope, 0.0)", "dact * slope", 1, "mlp"),
    "db1 of dact": Mutant("mlp", "tl.sum(dpre, axis=0)", "tl.sum(dact, axis=0)", 1, "mlp"),
    "db1's partial row": Mutant("mlp", "db_partial_ptr + pid_m.to(tl.int64) * n_cols", "db_partial_ptr", 1, "mlp"),
    "dgelu's column": Mutant("mlp", "i * (BLOCK_N // 4)", "(3 - i) * (BLOCK_N // 4)", 1, "mlp"),
    "ignore_index": Mutant("loss", "counted = target != ignore_index", "counted = target != -100", 1, "loss"),
    "the target's bias": Mutant("loss", "own += tl.load(bias_ptr", "own -= tl.load(bias_ptr", 1, "loss"),
    "z-loss": Mutant("loss", "z_loss * lse * lse", "z_loss * lse", 1, "loss"),
    "z-loss's gradient": Mutant("loss", "2.0 * z_loss", "z_loss", 1, "loss"),
    "smoothing's sign": Mutant("loss", "(own - mean)", "(mean - own)", 1, "loss"),
    "smoothing's gradient": Mutant("loss", "factor - uniform", "factor", 1, "loss"),
    "the target's gradient": Mutant("loss", "unit * (1.0 - label_smoothing), 0.0", "unit, 0.0", 1, "loss"),
    "the next column's gradient": Mutant("loss", "offs_v == target", "offs_v == target + 1", 1, "loss"),
    "columns past the valid": Mutant("loss", "offs_v < VOCAB, logits, -", "offs_v < COLUMNS, logits, -", 1, "loss"),
    "gradients past the valid": Mutant("loss", "dl = tl.where(offs_v < VOCAB, dl, 0.0)", "dl += 0.0", 1, "loss"),
    "mean over all columns": Mutant("loss", "axis=0) / VOCAB", "axis=0) / COLUMNS", 1, "loss"),
    "sum not faded": Mutant("loss", "total * smaller + 1.0", "total + 1.0", 1, "loss"),
    "lse without the maximum": Mutant("loss", "lse = high + tl.log", "lse = tl.log", 1, "loss"),
    "one row's weight for all": Mutant("loss", "row_weights_ptr + pid_n", "row_weights_ptr", 1, "losses"),
    "the first chunk's weights": Mutant("loss", "row_weights[chunk]", "row_weights[:4]", 1, "losses"),
    "the first chunk's targets": Mutant("loss", "targets[chunk]", "targets[:4]", 1, "losses"),
    "db of the last chunk": Mutant("loss", "before + sums", "0 * before + sums", 1, "loss"),
    "dW of the last chunk": Mutant("loss", "add=first > 0", "add=False", 1, "loss"),
    "no factor": Mutant("loss", "scaled = gradient * tl.load", "scaled = gradient + 0 * tl.load", 1, "loss"),
    "gradients not kept large": Mutant("loss", "tl.where(known, SCALE,", "tl.where(known, 1.0,", 1,
                                       "loss, float16"),
    "groups of dqkv's rows": Mutant("bias_grad", f"loop\n    {BY_GROUPS})", f"loop\n    {BY_GROUPS} * 2)", 1, "block"),
    "db of the last group alone": Mutant("bias_grad", "total += tl.load(x_ptr", "total = tl.load(x_ptr", 1, "block"),
    "dy's sums of other columns": Mutant("bias_grad", "pid_f - TILES_QKV", "pid_f - TILES_QKV + 1", 1, "block"),
    "groups of dy's rows": Mutant("bias_grad", f"float32)\n    {BY_GROUPS})", f"float32)\n    {BY_GROUPS} * 2)", 1,
                                  "block, dropout"),
    "db of undropped dy": Mutant("bias_grad", "dense_sum += dense", "dense_sum += dy", 1, "block, dropout"),
    "dense's mask for fc2": Mutant("bias_grad", "fc2_stream, fc2_threshold", "dense_stream, fc2_threshold", 1,
                                   "block, dropout"),
    "the first partial sums": Mutant("core/sums", "range(0, n_rows, ROWS)", "range(0, 1, ROWS)", 1, "block"),
    "the last partial sums": Mutant("core/sums", "total += tl.load(x_ptr", "total = tl.load(x_ptr", 1, "block"),
    "one branch's bias for both": Mutant("bias_grad", "store_sums(fc2_partial_ptr", "store_sums(dense_partial_ptr",
                                         1, "block, dropout"),
    "k not rotated": Mutant("projections", "first < 2 * WIDTH", "first < WIDTH", 1, "block, halves"),
    "the block's rotation": Mutant("projections", "a * c - b * s, b * c + a * s", "a * c + b * s, b * c - a * s", 1,
                                   "block"),
    "the whole head turns": Mutant("projections", "(tl.arange(0, PAIRS) == 0)", "(tl.arange(0, PAIRS) >= 0)", 1,
                                   "block"),
    "one position for all": Mutant("projections", "tl.load(positions_ptr + offs_n",
                                   "tl.load(positions_ptr + 0 * offs_n", 1, "block"),
    "in_proj's bias": Mutant("projections", "acc += tl.load(bias_ptr", "acc -= tl.load(bias_ptr", 1, "block"),
    "fc1 where v would end": Mutant("projections", "TILES_QKV * BLOCK_N - 3 * WIDTH", "TILES_QK * BLOCK_N - 2 * WIDTH",
                                    1, "block"),
    "in_proj's halves": Mutant("projections", "first + BLOCK_N // 2, end", "first, end", 1, "block, halves"),
    "act without gelu": Mutant("projections", "gelu_new(pre.to(tl.float32))", "pre.to(tl.float32)", 1, "block"),
    "fc1 again from another column": Mutant("projections", "pid_n += LEFT_OUT", "pid_n += 0", 1, "block, again"),
    "dense's weight for fc2": Mutant("projections", "weight_ptr + WIDTH, rows", "weight_ptr, rows", 1, "block"),
    "dense's weight for fc2 by TMA": Mutant("projections", "row, col, WIDTH, INNER", "row, col, 0, INNER", 1,
                                            "block, tma"),
    "dense's bias for fc2": Mutant("projections", "bias_ptr + WIDTH + columns", "bias_ptr + columns", 1, "block"),
    "the block's residual": Mutant("projections", "bias[None, :] + x)", "bias[None, :] - x)", 1, "block"),
    "out_proj's quarters": Mutant("projections", "column + BLOCK_N // 4", "column", 1, "block, halves"),
}


def draw(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(DEVICE) for name, shape in shapes.items()}


def linear_inputs(rows=33, columns=35, outputs=65):
    tensors = draw(x=(rows, columns), weight=(outputs, columns), bias=(outputs,), residual=(rows, outputs + 3))
    tensors["residual"] = tensors["residual"][:, :outputs]  # rows further apart than the output's
    return tensors


def loss_inputs(dtype=torch.float32):
    tensors = {name: x.to(dtype) for name, x in draw(x=(10, 8), weight=(150, 8), bias=(150,)).items()}
    targets = torch.tensor([3, 1, 76, 0, 65, 1, 9, 40, 64, 20], device=DEVICE)
    return tensors | {"targets": targets}


def block_case(recompute="none", **more):
    """40 rows: five groups of dqkv's, ten of dy's, three partial sums of dpre. v and fc1 end within a tile of in_proj.
    """
    cos, sin = rotary_tables(8)
    options = {"cos": cos, "sin": sin, "n_heads": 2, "batch": 2, **more}
    operation = functools.partial(parallel_block, recompute=recompute)
    return operation, parallel_block_reference, block_inputs((2, 20, 32, 2, 40)), options


def case(name):
    """The inputs of a check."""
    mask = Dropout(0.3, RNG, torch.tensor([3, 8, 1], device=DEVICE), layer=5, kind=2)
    linear_options = {"activation": "gelu_new", "dropout": mask}
    loss_options = {"ignore_index": 1, "label_smoothing": 0.2, "z_loss": 0.05, "valid_vocab": 77}
    mlp_shapes = {"x": (33, 32), "w1": (72, 32), "b1": (72,), "w2": (32, 72), "b2": (32,)}
    samples = torch.tensor([3, 8], device=DEVICE)
    losses = linear_cross_entropy, linear_cross_entropy_reference
    cases = {
        "norm": (add_layer_norm, add_layer_norm_reference,
                 draw(x=(15, 24), residual=(15, 24), weight=(24,), bias=(24,)), {"eps": 0.5}),
        "gelu": (gelu, gelu_reference, draw(x=(5, 40)), {}),
        "dropout": (dropout_add, dropout_add_reference, draw(x=(6, 70), residual=(6, 70)), {"dropout": mask}),
        "linear": (linear, linear_reference, linear_inputs(), linear_options),
        "linear, halves": (linear, linear_reference, linear_inputs(17, 16, 130), {}),
        "linear, persistent": (linear, linear_reference, linear_inputs(40, 16, 130), {}),
        "linear, tma": (linear, linear_reference, linear_inputs(17, 32, 65), {}),
        **{f"mlp{kind}": (mlp, mlp_reference, draw(**mlp_shapes), {}) for kind in ("", ", tma", ", cublas")},
        "loss": (*losses, loss_inputs(), loss_options),
        "losses": (*losses, loss_inputs(), {"reduction": "none"}),
        "loss, float16": (*losses, loss_inputs(torch.float16), {"reduction": "none"}),
        **{f"block{kind}": block_case() for kind in ("", ", halves", ", tma")},
        "block, again": block_case("mlp"),
        "block, dropout": block_case(dropouts=tuple(Dropout(0.3, RNG, samples, layer=5, kind=kind)
                                                   for kind in range(3))),
    }
    return Case(*cases[name], TILES | OTHER_TILES.get(name, {}))


OTHER_TILES = {
    "linear, halves": {("linear", "forward"): TILE | {"block_n": 128, "parts": 2}},
    "linear, persistent": {("linear", "forward"): TILE | {"persistent": 1}},
    "linear, tma": {("linear", "forward"): TILE | {"tma": 1}},
    "mlp, tma": {("mlp", "dgelu"): TILE | {"tma": 1}},
    "mlp, cublas": {("mlp", "dgelu"): {"cublas": 1}},
    "block, halves": {("block", "in_proj"): TILE | {"parts": 2}, ("block", "out_proj"): TILE | {"parts": 4}},
    "block, tma": {("block", kernel): TILE | {"tma": 1} for kernel in ("in_proj", "out_proj")},
}

test_without_a_mutant_every_check_passes, test_a_mutant_is_noticed = mutation_tests(FILES, SMALL, MUTANTS, case)
