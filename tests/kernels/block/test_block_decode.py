"""parallel_block_decode: the block behind a cache, against its reference and against the block without a cache."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from phi1 import testing
from phi1.kernels import backend, parallel_block, parallel_block_decode, parallel_block_prefill

SHAPES = [  # B, T new tokens, D, H, F, S tokens with those before, R
    (1, 1, 4, 1, 1, 1, 2),  # the smallest, and an empty cache
    (3, 1, 32, 2, 48, 20, 8),
    (2, 5, 128, 2, 512, 40, 32),  # several tokens; phi-1's head size and proportions
    (1, 1, 160, 2, 640, 33, 32),  # phi-2's head size
]


def make(shape, dtype=torch.float32):
    """Arguments; the cache is a view of a longer one, as the model's is, and NaN where it is to be written."""
    batch, tokens, width, n_heads, inner, length, rotary_size = shape
    generator = torch.Generator().manual_seed(1)
    cache = torch.randn(2, batch, length + 3, n_heads, width // n_heads, generator=generator).to(dtype)
    cache[:, :, length - tokens :] = torch.nan
    cos, sin = testing.rotary_tables(rotary_size, device="cpu")
    tensors = testing.block_inputs((batch, tokens, width, n_heads, inner), dtype, "cpu")
    return tensors | {"cos": cos, "sin": sin, "kv": cache[:, :, :length]}


def run(tensors, exact=False, **options):
    """(out, kv) with a cache of its own, whose storage is otherwise the same."""
    wide = {name: x.double() if exact and name not in ("cos", "sin") else x for name, x in tensors.items()}
    wide["kv"] = wide["kv"].clone()
    return parallel_block_decode(**wide, **options), wide["kv"]


def starts(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_matches_the_reference(shape, padded, dtype):
    tensors, options = make(shape, dtype), {"seq_starts": starts(0, 7, 3)[: shape[0]]} if padded else {}
    got = run(tensors, **options)
    with backend("reference"):
        eager, exact = run(tensors, **options), run(tensors, exact=True, **options)
    for i, name in enumerate(("out", "kv")):
        testing.assert_within_bound(got[i], eager[i], exact[i], name, roundings=8)
    before = shape[5] - shape[1]
    assert torch.equal(got[1][:, :, :before], tensors["kv"][:, :, :before])


def test_it_goes_on_where_the_prompt_ended():
    batch, tokens, width, n_heads, inner, rotary_size = 2, 12, 32, 2, 48, 8
    tensors = testing.block_inputs((batch, tokens, width, n_heads, inner), device="cpu")
    cos, sin = testing.rotary_tables(rotary_size, device="cpu")
    x, options = tensors.pop("x"), {"cos": cos, "sin": sin, "seq_starts": starts(0, 4)}
    whole = parallel_block(x, **tensors, **options, n_heads=n_heads, batch=batch).unflatten(0, (batch, -1))
    rows = x.unflatten(0, (batch, -1))
    kv = torch.empty(2, batch, tokens, n_heads, width // n_heads)
    _, *prompt = parallel_block_prefill(rows[:, :8].flatten(0, 1), **tensors, **options, n_heads=n_heads, batch=batch)
    kv[:, :, :8] = torch.stack(prompt).unflatten(1, (batch, -1))
    for first, last in ((8, 9), (9, 12)):
        out = parallel_block_decode(rows[:, first:last].flatten(0, 1), **tensors, **options, kv=kv[:, :, :last])
        torch.testing.assert_close(out.unflatten(0, (batch, -1)), whole[:, first:last], rtol=1e-5, atol=1e-5)


def grouped(tensors, positions):
    """x, the parameters and the rotation, as the operator takes them."""
    x, *parameters, cos, sin, _ = tensors.values()
    return x, parameters, (cos, sin, positions)


def test_positions_turn_the_keys():
    tensors = make(SHAPES[1])
    _, usual = run(tensors)
    _, same = run(tensors, positions=torch.full((3,), 19))
    _, other = run(tensors, positions=torch.full((3,), 5))
    assert torch.equal(usual, same)
    assert torch.equal(usual[1], other[1])
    assert not torch.allclose(usual[0, :, -1], other[0, :, -1])


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_past_checks_and_dispatcher_it_is_the_operator(dtype):
    tensors, own = make(SHAPES[2], dtype), []
    positions, seq_starts = torch.arange(35, 40).repeat(2), starts(0, 7)
    for check in (True, False):
        own.append(run(tensors, positions=positions, seq_starts=seq_starts, check=check))
    kv = tensors["kv"].clone()
    own.append((torch.ops.phi1.parallel_block_decode(*grouped(tensors, positions), kv, seq_starts, 1e-5), kv))
    for out, kv in own:
        assert torch.equal(out, own[0][0])
        assert torch.equal(kv, own[0][1])


def test_the_operator_is_sound():
    tensors = make(SHAPES[1]) | {"kv": make(SHAPES[1])["kv"].nan_to_num()}
    arguments = *grouped(tensors, torch.full((3,), 19)), tensors["kv"], None, 1e-5
    testing.assert_operator_is_sound("parallel_block_decode", arguments)


def test_compiled_whole_it_has_the_same_bits():
    tensors = make(SHAPES[2])
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(tensors, seq_starts=starts(0, 7))
    for a, b in zip(got, run(tensors, seq_starts=starts(0, 7)), strict=True):
        assert torch.equal(a, b)


def test_what_looks_on_sees_the_operator():
    """A mode of dispatch, and fake tensors, whose shapes are all that is right about them."""
    tensors, options = make(SHAPES[2]), {"positions": torch.arange(35, 40).repeat(2), "check": False}
    seen = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **kwargs or {})

    with Seen():
        run(tensors, **options)
    assert "phi1.parallel_block_decode.default" in seen
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        out, _ = run(tensors, **options)
        assert isinstance(out, FakeTensor)
    out, _ = run({name: mode.from_tensor(x) for name, x in tensors.items()},
                 **options | {"positions": mode.from_tensor(options["positions"])})
    assert isinstance(out, FakeTensor)
    assert out.shape == tensors["x"].shape


def test_autocast_does_not_reach_it():
    tensors = make(SHAPES[2])
    plain, kv = run(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        out, again = run(tensors)
    assert torch.equal(out, plain)
    assert torch.equal(again, kv)


def bad(**changes):
    return make(SHAPES[1]) | changes


KV = torch.zeros(2, 3, 20, 2, 16)


@pytest.mark.parametrize(("arguments", "error", "match"), [
    (bad(x=None), TypeError, "x must be a tensor"),
    (bad(kv=None), TypeError, "kv must be a tensor"),
    (bad(kv=KV[0]), ValueError, r"kv must be \[2, B, S, H, K\]"),
    (bad(kv=KV.half()), TypeError, "kv must have x's dtype"),
    (bad(kv=KV.to("meta")), ValueError, "kv must be on x's device"),
    (bad(kv=KV[:1]), ValueError, r"kv.shape must be \(2, 3, 20, 2, 16\), keys and values of x's 32 columns"),
    (bad(kv=KV[..., :8]), ValueError, r"kv.shape must be \(2, 3, 20, 2, 16\)"),
    (bad(kv=KV[:, :2]), ValueError, "kv's batch must divide the 3 rows of x; got 2"),
    (bad(kv=KV[:, :0]), ValueError, "kv's batch must divide the 3 rows of x; got 0"),
    (bad(kv=KV[:, :, :0]), ValueError, "kv must have room for the 1 tokens of each sequence; got 0"),
    (bad(kv=KV[:, :1].expand(2, 3, 20, 2, 16)), ValueError, "kv must not be expanded"),
    (bad(kv=KV.clone().requires_grad_()), ValueError, "no argument may want a gradient"),
    (bad(cos=torch.zeros(150, 4).requires_grad_()), ValueError, "no argument may want a gradient"),
    (bad(cos=None), TypeError, "cos must be a tensor"),
    (bad(in_bias=torch.zeros(144).requires_grad_()), ValueError, "no argument may want a gradient.*got one that does"),
    (bad(out_bias=torch.zeros(32)), ValueError, r"out_bias.shape must be \(2, 32\)"),
    (bad(check=None), TypeError, "check must be True or False; got None"),
    (bad(eps=0.0), ValueError, "eps must be greater than 0"),
    (bad(cos=torch.zeros(150, 9), sin=torch.zeros(150, 9)), ValueError, "cos must have between 1 and 8 columns"),
    (bad(positions=torch.full((3,), 150)), ValueError, "positions must be at least 0 and less than 150"),
    (bad(positions=torch.zeros(4).long()), ValueError, r"positions.shape must be \(3,\)"),
    (bad(seq_starts=starts(0, 21, 0)), ValueError, "seq_starts must be at least 0 and less than 21"),
])
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=f"^parallel_block_decode: {match}"):
        parallel_block_decode(**arguments)
