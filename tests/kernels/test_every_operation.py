"""Properties of every operation: memory layouts, empty input, refusals, torch.compile, checkpointing, autocast, and
gradients that are absent, expanded or wanted twice."""

from contextlib import nullcontext

import pytest
import torch
from kernel_checks import (
    assert_compiles_whole,
    assert_matches_reference,
    launches,
    only,
    outputs_and_gradients,
)
from operation_cases import CASES, case
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from phi1 import kernels
from phi1.kernels import backend

OPERATIONS = [name for name in CASES if "," not in name]
# The interpreter takes longest for attention; its variants are tested there by test_attention.py and test_block.py.
DEAR = [name for name in CASES if name.startswith(("attention", "parallel_block")) and "," in name]
ON_ANY = [*(name for name in CASES if name not in DEAR), *only("eager", *DEAR)]


def test_every_operation_is_known_here():
    operations = {name for name in kernels.__all__ if hasattr(torch.ops.phi1, name)}
    without_backward = {"rotary_", "parallel_block_decode", "parallel_block_prefill"}
    assert operations == {*OPERATIONS, *without_backward}


def columns_first(x):
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def elements_apart(x):
    return x.repeat_interleave(2, -1)[..., ::2]


def rows_of_a_wider_one(x):
    """NaN lies on all sides of what is read."""
    wide = torch.nn.functional.pad(x, (3, 5) * x.dim(), value=torch.nan if x.is_floating_point() else 0)
    return wide[(slice(3, -5),) * x.dim()]


def expanded(x):
    """Every element of a vector is its first one, in one place in memory; all else stays."""
    return x[:1].expand_as(x) if x.dim() == 1 else x


def laid_out(layout, options):
    """The options with their tensors laid out, those of a pair too."""
    return {name: layout(x) if isinstance(x, torch.Tensor) else
            tuple(map(layout, x)) if name == "rotary" else x for name, x in options.items()}


@pytest.mark.parametrize("dtype", [*only("eager", torch.float32), torch.float16], ids=str)
@pytest.mark.parametrize("layout", [columns_first, elements_apart, rows_of_a_wider_one, expanded])
@pytest.mark.parametrize("name", ON_ANY)
def test_any_layout_matches_reference_and_is_not_written_to(device, name, layout, dtype):
    of = case(name, device, dtype)
    tensors = {argument: layout(x) for argument, x in of.tensors.items()}
    options = of.options if layout is expanded else laid_out(layout, of.options)
    before = {argument: x.clone() for argument, x in tensors.items()}
    assert_matches_reference(of.operation, of.reference, tensors, roundings=of.roundings, **options)
    for argument, x in tensors.items():
        assert torch.equal(x, before[argument]), argument


@pytest.mark.parametrize("name", ON_ANY)
def test_empty_input_gives_empty_output_and_no_gradients_to_parameters(device, name):
    of = case(name, device, rows=0)
    if name == "linear_cross_entropy":  # whose mean over nothing is NaN
        of.options["reduction"] = "sum"
    assert_matches_reference(of.operation, of.reference, of.tensors, **of.options)
    for output, value in outputs_and_gradients(of.operation, of.tensors, **of.options).items():
        assert not value.any(), output


def last(out):
    return out if isinstance(out, torch.Tensor) else out[-1]


@pytest.mark.parametrize("name", ON_ANY)
def test_an_expanded_gradient_gives_the_bits_of_a_whole_one(device, name):
    of = case(name, device)
    leaves = {argument: x.requires_grad_() for argument, x in of.tensors.items()}
    out = last(of.operation(**leaves, **of.options))
    one = torch.ones((), device=device, dtype=out.dtype).expand_as(out)
    expanded, whole = (torch.autograd.grad(out, [*leaves.values()], upstream, retain_graph=True)
                       for upstream in (one, one.contiguous()))
    for argument, got, wanted in zip(leaves, expanded, whole, strict=True):
        assert torch.equal(got, wanted), argument


@pytest.mark.parametrize("name", ON_ANY)
def test_triton_kernels_run_forward_and_backward_and_only_on_their_backend(request, device, name):
    of = case(name, device, rows=2)
    leaves = {argument: x.requires_grad_() for argument, x in of.tensors.items()}
    with launches() as launched:
        out = last(of.operation(**leaves, **of.options))
        forward = len(launched)
        torch.autograd.grad(out, [*leaves.values()], torch.ones_like(out))
    if request.node.get_closest_marker("triton"):
        assert 0 < forward < len(launched)
    else:
        assert not launched


@pytest.mark.triton
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_bitwise_repeatable(device, name):
    of = case(name, device, torch.float16, rows=20 if device == "cpu" else 4000)
    first, second = (outputs_and_gradients(of.operation, of.tensors, **of.options) for _ in range(2))
    for output, value in first.items():
        assert torch.equal(value, second[output]), output


ALSO_ON_KERNELS = ("attention, dropped", "attention_qkv")  # of which the interpreter has to compute three forwards
ON_CPUS = [name for name in CASES if name not in ALSO_ON_KERNELS]


@pytest.mark.parametrize("name", [*ALSO_ON_KERNELS, *only("eager", *ON_CPUS)])
def test_a_checkpointed_operation_has_the_same_bits(device, name):
    of = case(name, device, torch.float16)
    calls = []

    def counted(**arguments):
        calls.append(name)
        return of.operation(**arguments)

    expected = outputs_and_gradients(of.operation, of.tensors, **of.options)
    found = outputs_and_gradients(lambda **arguments: checkpoint(counted, use_reentrant=False, **arguments),
                                  of.tensors, **of.options)
    assert len(calls) == 2
    for output, value in expected.items():
        assert torch.equal(found[output], value), output


@pytest.mark.parametrize("name", CASES)
def test_compiles_whole(name):
    of = case(name)
    assert_compiles_whole(of.operation, of.tensors, **of.options)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_backend_calls_the_reference(name):
    for dtype in (torch.float32, torch.float64):
        of = case(name, dtype=dtype)
        with backend("reference"):
            found = outputs_and_gradients(of.operation, of.tensors, **of.options)
        for output, value in outputs_and_gradients(of.reference, of.tensors, **of.options).items():
            assert found[output].dtype == value.dtype
            assert torch.equal(found[output], value), output


class Absent(torch.autograd.Function):
    """Passes x on, and gives no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, _):
        return None


@pytest.mark.parametrize("name", CASES)
def test_an_absent_gradient_is_none(name):
    of = case(name)
    leaves = {argument: x.requires_grad_() for argument, x in of.tensors.items()}
    Absent.apply(last(of.operation(**leaves, **of.options))).sum().backward()
    for argument, x in leaves.items():
        assert x.grad is None or not x.grad.any(), argument


@pytest.mark.parametrize("name", CASES)
def test_the_arguments_decide_and_not_autocast(name):
    of = case(name)

    def outcome(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return outputs_and_gradients(of.operation, of.tensors, **of.options)

    plain = outcome(False)
    for output, got in outcome(True).items():
        assert got.dtype == torch.float32
        assert torch.equal(got, plain[output]), output


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("rotary", "dropout_add")])  # linear in x
def test_a_second_backward_raises(name):
    of = case(name)
    leaves = {argument: x.requires_grad_() for argument, x in of.tensors.items()}
    out = last(of.operation(**leaves, **of.options))
    x = next(iter(leaves.values()))
    gradient, = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        (gradient.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("forced", ["eager", "reference"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_tensors_of_another_kind_are_refused(name, forced):
    of = case(name)
    first, *others = of.tensors
    tables = {argument: x for argument, x in of.options.items() if isinstance(x, torch.Tensor)}

    def refused(error, argument, message, value):
        with pytest.raises(error, match=f"^{name}: {argument} {message}"):
            of.operation(**of.tensors | of.options | {argument: value})

    with backend("reference") if forced == "reference" else nullcontext():
        for argument, x in (of.tensors | tables).items():
            refused(TypeError, argument, "must be a tensor; got list", [1.0])
            refused(TypeError, argument, "must be a dense tensor; got a sparse_coo one", x.to_sparse())
            if argument != first:
                refused(ValueError, argument, r"must be on \w+'s device \(cpu\); got meta", x.to("meta"))
        for argument in others:
            refused(TypeError, argument, rf"must have {first}'s dtype \(float32\); got float16",
                    of.tensors[argument].half())
        refused(TypeError, first, "must be float16, bfloat16 or float32 .*; got int32", of.tensors[first].int())
        if forced == "eager":
            refused(TypeError, first, r".*\(float64 inside backend\('reference'\)\); got float64",
                    of.tensors[first].double())


@pytest.mark.parametrize("name", CASES)
def test_forward_mode_and_torch_func_are_refused_for_each_argument(name):
    of = case(name)
    for argument, x in of.tensors.items():
        def call(x, argument=argument):
            return last(of.operation(**of.tensors | of.options | {argument: x}))

        message = rf"^{name.split(',')[0]}: .*backend\('reference'\) has them; got {argument} "
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(call, (x,), (x,))
        with pytest.raises(NotImplementedError, match=message):
            torch.func.grad(lambda x, call=call: call(x).sum())(x)
        with pytest.raises(NotImplementedError, match=message), forward_ad.dual_level():
            call(forward_ad.make_dual(x, x))
        with forward_ad.dual_level():
            call(x)  # no tangent, so nothing is lost
    with backend("reference"):
        assert torch.func.jvp(call, (x,), (x,))[1].any()
        assert torch.func.grad(lambda x: call(x).sum())(x).any()


def test_jacfwd_and_linearize_are_refused():
    x = torch.randn(3)
    for transform in (torch.func.jacfwd(kernels.gelu), lambda x: torch.func.linearize(kernels.gelu, x),
                      torch.vmap(torch.func.grad(lambda x: kernels.gelu(x).sum()))):
        with pytest.raises(NotImplementedError, match=r"^gelu: .* not supported"):
            transform(x)


def test_the_gradient_penalty_of_a_loss_raises_even_where_none_is_allowed():
    of = case("linear_cross_entropy")
    leaves = [x.requires_grad_() for x in of.tensors.values()]
    gradients = torch.autograd.grad(of.operation(**of.tensors, **of.options), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(sum(g.float().square().sum() for g in gradients), leaves, allow_unused=True)
