"""Launches, bytes and flops are counted as one would by hand, and the sequences of whole units hold together."""

import os
import sys

import pytest
import torch

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("counts launches of compiled kernels", allow_module_level=True)

from phi1.bench.compile import roof
from phi1.bench.compile import sequences as op_sequences
from phi1.bench.compile.cases import cases
from phi1.bench.harness.counting import TRITON_FLOPS, Launch, counting
from phi1.config import preset
from phi1.kernels import layer_norm
from phi1.kernels.core import tiles
from phi1.model import Phi1

TINY = preset("nano", num_hidden_layers=2)


def meta(*shape, dtype=torch.float16, **options):
    return torch.empty(shape, dtype=dtype, device="meta", **options)


def counted(function):
    with counting() as counter:
        function()
    return counter.launches


def accumulate(total, a, b):
    torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda: meta(4, 8) @ meta(8, 16), [Launch("mm", 2 * (32 + 128 + 64), 2 * 4 * 8 * 16)]),
        (lambda: torch.addmm(meta(16), meta(4, 8), meta(8, 16)), [Launch("addmm", 2 * (16 + 32 + 128 + 64), 1024)]),
        (lambda: meta(4, 8).add_(meta(4, 8)), [Launch("add_", 3 * 64)]),
        (lambda: meta(4, 8).copy_(meta(4, 8)), [Launch("copy_", 2 * 64)]),
        (lambda: meta(4, 8).zero_(), [Launch("zero_", 64)]),
        (lambda: meta(4, 8).t().reshape(8, 4)[:2].unsqueeze(0), []),
        (lambda: meta(4, 8) + meta(1, 8).expand(4, 8), [Launch("add", 64 + 16 + 64)]),
        (lambda: torch.nn.functional.embedding(meta(4, dtype=torch.int64), meta(1000, 8)),
         [Launch("embedding", 4 * 8 + 2 * 64)]),
        (lambda: torch.mm(meta(4, 8), meta(8, 16), out=meta(4, 16)), [Launch("mm", 2 * (32 + 128 + 64), 1024)]),
        (lambda: accumulate(meta(4, 16, dtype=torch.float32), meta(4, 8), meta(8, 16)),
         [Launch("addmm", 4 * 64 + 2 * (32 + 128) + 4 * 64, 1024)]),
        (lambda: meta(4, 16).addmm_(meta(4, 8), meta(8, 16)), [Launch("addmm_", 2 * (2 * 64 + 32 + 128), 1024)]),
        (lambda: meta(3, 4, 16).baddbmm_(meta(3, 4, 8), batch2=meta(3, 8, 16)),
         [Launch("baddbmm_", 3 * 2 * (2 * 64 + 32 + 128), 3 * 1024)]),
        (lambda: meta(4, 8) @ meta(8), [Launch("mv", 2 * (32 + 8 + 4), 2 * 4 * 8)]),
    ],
    ids=["mm", "addmm", "in place", "copy", "fill", "views", "broadcast", "embedding", "out", "wider out",
         "product in place", "products in place", "vector"],
)
def test_operators_are_counted_by_their_reads_and_writes(function, expected):
    assert counted(function) == expected


def test_our_operators_are_opened_and_their_kernels_counted_in_both_directions():
    x, weight, bias = meta(64, 2048, requires_grad=True), meta(2048), meta(2048)
    launches = counted(lambda: layer_norm(x, weight, bias).backward(meta(64, 2048)))
    assert [launch.name for launch in launches if launch.name.endswith("_kernel")] == [
        "layer_norm_forward_kernel", "layer_norm_backward_kernel", "sum_partials_kernel"]
    forward = launches[0]
    # x, y, weight, bias in float16; mean and rstd in float32
    assert forward.n_bytes == 2 * (2 * 64 * 2048 + 2 * 2048) + 4 * 2 * 64


def test_nothing_stays_patched():
    counted(lambda: None)
    assert not meta(1).is_cuda


def test_every_kernel_that_multiplies_matrices_has_its_flops():
    multiplying = {case.kernel.fn.__name__ for case in cases("sm_90") if case.tensor_core}
    assert multiplying - set(TRITON_FLOPS) == set()


BY_ARCH = [(provider, arch) for provider in op_sequences.OURS for arch in tiles.ARCHITECTURES]
THEIRS = [(provider, "sm_90") for provider in op_sequences.PROVIDERS if provider not in op_sequences.OURS]


@pytest.mark.parametrize(("provider", "arch"), [*BY_ARCH, *THEIRS])
def test_all_providers_do_the_same_matrix_products(provider, arch):
    pytest.importorskip("transformers")
    launches = op_sequences.sequence(provider, "layer forward", batch=2, tokens=128, config=TINY, arch=arch)
    rows, d, f = 2 * 128, TINY.hidden_size, TINY.intermediate_size
    products = 2 * rows * d * (4 * d + 2 * f)
    attention = 4 * 2 * 128 * 128 * d / (1 if provider == "transformers" else 2)
    assert sum(launch.n_flops for launch in launches) == products + attention


@pytest.mark.parametrize(("provider", "arch", "forward", "backward"), [
    *(("phi1", arch, 4, 13) for arch in ("sm_90", "sm_100", "gfx942")),
    *(("phi1 dropout", arch, 5, 14) for arch in ("sm_90", "sm_100", "gfx942")),
    # cuBLAS multiplies, and what our kernels fuse into the products are launches of their own
    ("phi1", "sm_80", 10, 13), ("phi1 dropout", "sm_80", 8, 14),
])
def test_a_layer_takes_as_many_launches_as_the_readme_says(provider, arch, forward, backward):
    found = [len(op_sequences.sequence(provider, unit, arch=arch))
             for unit in ("layer forward", "layer forward+backward")]
    assert found == [forward, forward + backward]


def test_each_gpu_of_the_report_has_the_launches_of_its_own_architecture(monkeypatch, capsys):
    def made_up(provider, unit, *, arch):
        if provider not in op_sequences.OURS:
            return [Launch("mm", 3.35e9)]
        return [Launch("addmm", 2.039e9), Launch("gelu_kernel", 2.039e9)] if arch == "sm_80" else [
            Launch("in_proj_kernel", 8e9)]

    monkeypatch.setattr(roof, "sequence", made_up)
    monkeypatch.setattr(roof, "select", lambda *chosen: [])
    roof.print_roofs()
    kernels, sequences = (part.splitlines()[1:] for part in capsys.readouterr().out.strip().split("\n\n"))
    assert [line.split() for line in kernels[1:]] == [
        ["in_proj_kernel", "1", "8000.0", "0.0", "-", "2388.1", "1000.0", "1509.4"],
        ["gelu_kernel", "1", "2039.0", "0.0", "1000.0", "-", "-", "-"]]
    assert [line.split()[2:] for line in sequences[1:4]] == [
        ["phi1", "2", "4.08", "0.000", "2.00", "-", "-", "-"],
        ["phi1", "1", "8.00", "0.000", "-", "2.39", "1.00", "1.51"],
        ["phi1", "dropout", "2", "4.08", "0.000", "2.00", "-", "-", "-"]]
    assert sequences[5].split()[2:] == ["transformers", "1", "3.35", "0.000", "1.64", "1.00", "0.42", "0.63"]


def test_every_kernel_that_is_compiled_has_its_bytes_and_its_time_at_the_roof():
    lines = roof.kernel_lines({"sm_90": op_sequences.sequence("phi1", "training step", arch="sm_90")})
    assert {case.kernel.fn.__name__ for case in cases("sm_90")} <= {line.split()[0] for line in lines}
    gelu = [line.split(maxsplit=8) for line in lines if line.startswith("epilogue_forward_kernel")]
    n_bytes = 2 * 2 * 16384 * 8192  # x in, y out, in float16
    assert gelu == [["epilogue_forward_kernel", "1", f"{n_bytes / 1e6:.1f}", "0.0", "-", f"{n_bytes / 3350e3:.1f}", "-",
                     "-", "gelu N=16384 F=8192 float16 forward"]]


@pytest.mark.parametrize(("recompute", "launches"), [("mlp", 1), ("block", 2)])
def test_computing_again_is_one_product_and_for_a_whole_block_attention(recompute, launches):
    batch, tokens, d, f = 2, 128, TINY.hidden_size, TINY.intermediate_size

    def step(mode):
        model, x = Phi1(TINY, device="meta", dtype=torch.float16), meta(batch * tokens, d)
        cos, sin = model.rotary_tables.unbind(0)
        positions = meta(batch * tokens, dtype=torch.int64)
        model.blocks[0](x, cos, sin, batch=batch, positions=positions, recompute=mode).backward(x)

    none, again = (counted(lambda mode=mode: step(mode)) for mode in ("none", recompute))
    assert len(again) - len(none) == launches
    more = sum(launch.n_flops for launch in again) - sum(launch.n_flops for launch in none)
    of_qkv = 2 * batch * tokens * d * (3 * d + tokens) if recompute == "block" else 0  # attention's is causal: a half
    assert more == 2 * batch * tokens * d * f + of_qkv


def test_a_step_is_its_layers_and_more():
    step, forward, both = (op_sequences.sequence("phi1", unit, batch=2, tokens=128, config=TINY, arch="sm_90")
                           for unit in ("training step", "layer forward", "layer forward+backward"))
    assert len(forward) < len(both) < len(step)
    assert sum(launch.name == "_fused_adamw_" for launch in step) == 1
    kernels = [launch.name for launch in both if launch.name.endswith("_kernel")]
    for name in set(kernels):
        in_step = sum(launch.name == name for launch in step)
        assert in_step >= TINY.num_hidden_layers * kernels.count(name), name
