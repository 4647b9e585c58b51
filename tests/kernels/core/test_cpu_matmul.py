"""Products of the PyTorch code: what a CPU has no arithmetic for goes through float32, whatever the layout."""

import platform
from pathlib import Path

import pytest
import torch
from kernel_checks import block_inputs, rotary_tables

from phi1.kernels import linear, linear_cross_entropy, mlp, parallel_block
from phi1.kernels.core import cpu_matmul, cpu_memory
from phi1.kernels.core.cpu_matmul import addmm, least_rows, mm, multiplies

WIDE = 64  # enough on any CPU
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half a unit in the last place of 1

LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "columns of a wider one": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
    "every other": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
}


@pytest.fixture
def in_float32(monkeypatch):
    """A CPU without arithmetic for float16 and bfloat16."""
    monkeypatch.setattr(cpu_matmul, "multiplies", lambda dtype: False)


def draw(*shape, dtype=torch.float16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("columns", [1, 48, 4096])
@pytest.mark.parametrize("shape", [(WIDE, 70, WIDE), (130, 1, 200)], ids=str)
@pytest.mark.parametrize("of_b", LAYOUTS)
@pytest.mark.parametrize("of_a", LAYOUTS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_product_is_rounded_once(in_float32, monkeypatch, dtype, of_a, of_b, shape, columns):
    monkeypatch.setattr(cpu_matmul, "COLUMNS", columns)
    m, k, n = shape
    a, b = LAYOUTS[of_a](draw(m, k, dtype=dtype)), LAYOUTS[of_b](draw(k, n, dtype=dtype, seed=1))
    c, row = draw(m, n, dtype=dtype, seed=2), draw(n, dtype=dtype, seed=3)
    into = torch.empty(m, 2 * n, dtype=dtype)[:, ::2]
    exact = a.double() @ b.double()
    with_c = c + exact
    for got, wanted in ((mm(a, b), exact), (mm(a, b, out=into), exact), (addmm(row, a, b), row + exact),
                        (addmm(c, a, b), with_c), (addmm(c, a, b, out=c), with_c)):
        # Half a unit in the last place, and what float32 has added to it.
        assert ((got - wanted).abs() <= ROUNDING[dtype] * wanted.abs() + 2**-25 + 1e-5 * k**0.5).all()
    assert into.equal(mm(a, b))


def test_its_range_is_float16s_at_the_end_alone(in_float32):
    a = torch.full((WIDE, 4), 300.0, dtype=torch.float16)
    b = torch.full((4, WIDE), 300.0, dtype=torch.float16)
    b[2:] = -300.0
    assert mm(a, b).eq(0).all()
    assert addmm(b[0], a, b.abs()).isinf().all()


@pytest.mark.parametrize(("rows", "columns", "known", "dtype"), [
    (15, 200, (), torch.float16), (200, 15, (), torch.bfloat16), (63, 200, (torch.bfloat16,), torch.float16),
    (200, 200, (torch.float16,), torch.float16), (200, 200, (torch.bfloat16,), torch.bfloat16),
])
def test_all_else_is_pytorchs(monkeypatch, rows, columns, known, dtype):
    monkeypatch.setattr(cpu_matmul, "multiplies", lambda dtype: dtype in known)
    monkeypatch.setattr(cpu_matmul, "_wide_product", None)
    a, b, c = draw(rows, 30, dtype=dtype), draw(30, columns, dtype=dtype, seed=1), draw(columns, dtype=dtype, seed=2)
    assert torch.equal(mm(a, b), torch.mm(a, b))
    assert torch.equal(addmm(c, a, b), torch.addmm(c, a, b))


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="reads x86 flags of Linux")
def test_it_is_known_what_this_cpu_multiplies():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert multiplies(torch.float16) == bool(flags & {"avx512_fp16", "amx_fp16"})
    assert multiplies(torch.bfloat16) == (flags >= {"avx512bw", "avx512vl", "avx512dq"})
    assert multiplies(torch.float32)
    assert least_rows() == (64 if multiplies(torch.bfloat16) else 16)


def test_a_large_weight_is_never_wide_as_a_whole(in_float32):
    """Nor does the process keep more than the rows and a few slices."""
    x, weight = draw(WIDE, 256), draw(51200, 256)
    before = cpu_memory._kept_bytes()
    linear(x, weight)
    linear_cross_entropy(x, weight, None, torch.zeros(WIDE, dtype=torch.int64), workspace_mb=2)
    logits = WIDE * weight.shape[0] * (2 + 4)  # of the loss
    assert cpu_memory._kept_bytes() - before <= 3 * 4096 * (256 + WIDE) * 4 + logits < weight.numel() * 4


def operations(dtype):
    w, b = draw(96, 64, dtype=dtype, seed=4), draw(96, dtype=dtype, seed=5)
    targets = torch.zeros(WIDE, dtype=torch.int64)
    tables = dict(zip(("cos", "sin"), rotary_tables(8, device="cpu"), strict=True))
    block = {name: value for name, value in block_inputs((1, WIDE, 64, 2, 96), dtype, "cpu").items() if name != "x"}
    return {
        "linear": lambda x: linear(x, w, b),
        "mlp": lambda x: mlp(x, w, b, w.t().contiguous(), b.new_zeros(64)),
        "linear_cross_entropy": lambda x: linear_cross_entropy(x, w, b, targets),
        "parallel_block": lambda x: parallel_block(x, **block, **tables, n_heads=2),
    }


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("op", operations(torch.float16))
def test_operations_multiply_so_forward_and_backward(in_float32, monkeypatch, op, dtype):
    products = []
    original = cpu_matmul._wide_product
    monkeypatch.setattr(cpu_matmul, "_wide_product", lambda *a: products.append(a) or original(*a))
    x = draw(WIDE, 64, dtype=dtype).requires_grad_()
    out = operations(dtype)[op](x)
    forward = len(products)
    out.sum().backward()
    assert forward > 0
    assert forward < len(products) or op == "linear_cross_entropy"  # whose forward has computed its gradients
    assert op != "linear_cross_entropy" or dtype == torch.float16 or len(products) == 2
