"""The embedding: its rows, and its gradient when one token fills half of the batch."""

import pytest
import torch

from phi1 import Phi1, preset, testing
from phi1.embedding import embed

VOCAB, WIDTH, ROWS = 1000, 24, 3000


def make(dtype):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (ROWS,), generator=generator)
    ids[::2] = 7
    return torch.randn(VOCAB, WIDTH, generator=generator).to(dtype), ids


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_rows_and_gradient(dtype):
    weight, ids = make(dtype)
    dout = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = embed(weight.requires_grad_(), ids)
    assert torch.equal(out, weight[ids])
    out.backward(dout)
    exact = torch.zeros(VOCAB, WIDTH, dtype=torch.float64).index_add_(0, ids, dout.double())
    allowed = 1e-5 + (0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)  # the sum's, and one rounding
    assert ((weight.grad.double() - exact).abs() <= allowed * exact).all()


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_the_gradient_has_the_same_bits_on_any_number_of_threads(dtype):
    weight, ids = make(dtype)
    dout = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 1, 2, 3):
            torch.set_num_threads(n)
            found += torch.autograd.grad(embed(weight.requires_grad_(), ids), weight, dout)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, found[0]) for gradient in found[1:])


def test_the_model_uses_the_operator():
    model = Phi1(preset("nano", vocab_size=50, num_hidden_layers=1), dtype=torch.bfloat16)
    model.init_weights(0)
    ids = torch.full((2, 30), 3)
    names = [node.name() for node in _nodes(model.loss(ids, ids).grad_fn)]
    assert any("phi1_embedding" in name for name in names)


def _nodes(node):
    seen, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen


def test_operators_are_sound_also_without_tokens():
    weight, ids = make(torch.bfloat16)
    (gradient,) = torch.autograd.grad(embed(weight.requires_grad_(), ids[:0]).sum(), weight)
    assert not gradient.any()
    weight = weight.detach()
    testing.assert_operator_is_sound("embedding", (weight[:9].requires_grad_(), ids[:5] % 9))
    testing.assert_operator_is_sound("embedding_backward", (weight[:5], ids[:5] % 9, 9))
    testing.assert_compiles_whole(embed, {"weight": weight, "ids": ids})
