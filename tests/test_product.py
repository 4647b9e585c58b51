"""Products of the PyTorch code: float16 on CPUs that do not multiply it goes through float32, whatever the layout."""

import pytest
import torch

from phi1 import testing
from phi1.kernels import _product
from phi1.kernels._product import WIDE, addmm, mm

LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "columns of a wider one": lambda x: torch.cat((x, x), dim=1)[:, : x.shape[1]],
    "every other": lambda x: x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2],
}


@pytest.fixture
def without_float16(monkeypatch):
    monkeypatch.setattr(_product, "_multiplies_float16", lambda: False)


def draw(*shape, dtype=torch.float16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(WIDE, 70, WIDE), (130, 1, 200)], ids=str)
@pytest.mark.parametrize("of_b", LAYOUTS)
@pytest.mark.parametrize("of_a", LAYOUTS)
def test_float16_is_rounded_once(without_float16, of_a, of_b, shape):
    m, k, n = shape
    a, b = LAYOUTS[of_a](draw(m, k)), LAYOUTS[of_b](draw(k, n, seed=1))
    c, row, into = draw(m, n, seed=2), draw(n, seed=3), torch.empty(m, 2 * n, dtype=torch.float16)[:, ::2]
    exact = a.double() @ b.double()
    with_c = c + exact
    for got, wanted in ((mm(a, b), exact), (mm(a, b, out=into), exact), (addmm(row, a, b), row + exact),
                        (addmm(c, a, b), with_c), (addmm(c, a, b, out=c), with_c)):
        # Half a unit in the last place, and what float32 has added to it.
        assert ((got - wanted).abs() <= 2**-11 * wanted.abs() + 2**-25 + 1e-5 * k**0.5).all()
    assert into.equal(mm(a, b))


def test_its_range_is_float16s_at_the_end_alone(without_float16):
    a = torch.full((WIDE, 4), 300.0, dtype=torch.float16)
    b = torch.full((4, WIDE), 300.0, dtype=torch.float16)
    b[2:] = -300.0
    assert mm(a, b).eq(0).all()
    assert addmm(b[0], a, b.abs()).isinf().all()


@pytest.mark.parametrize(("rows", "columns", "multiplies", "dtype"), [
    (WIDE - 1, 200, False, torch.float16), (200, WIDE - 1, False, torch.float16), (200, 200, True, torch.float16),
    *((200, 200, False, dtype) for dtype in testing.DTYPES if dtype != torch.float16),
])
def test_all_else_is_pytorchs(monkeypatch, rows, columns, multiplies, dtype):
    monkeypatch.setattr(_product, "_multiplies_float16", lambda: multiplies)
    monkeypatch.setattr(_product, "_wide", None)
    a, b, c = draw(rows, 30, dtype=dtype), draw(30, columns, dtype=dtype, seed=1), draw(columns, dtype=dtype, seed=2)
    assert torch.equal(mm(a, b), torch.mm(a, b))
    assert torch.equal(addmm(c, a, b), torch.addmm(c, a, b))

