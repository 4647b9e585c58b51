"""The registry of benchmark cases: complete, well formed, and right about its formulas."""

from dataclasses import replace

import pytest
import torch
from double_case import make

from phi1 import kernels
from phi1.bench.cases import block
from phi1.bench.cases.attention import document_lengths
from phi1.bench.cases.registry import all_cases, operations, select
from phi1.bench.harness import check
from phi1.bench.harness.case import ELEMENT_BYTES
from phi1.bench.harness.providers import VERSIONS, reference_of

CPU = torch.device("cpu")
NOT_OPERATIONS = {"Dropout", "backend", "check_values", "empty"}
SMALL = [case for case in select("cpu", quick=True) if case.unit in ("kernel", "block")]


def draw(case):
    return case.draw(CPU, 1)


@pytest.mark.parametrize("op", sorted(set(kernels.__all__) - NOT_OPERATIONS))
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_public_operation_has_cases_both_ways(op, kind):
    """A new public operation without a case fails here."""
    directions = {case.direction for case in select(kind, [op], quick=True)}
    # What writes in place has no backward, nor what decoding alone needs.
    forward_only = op.endswith("_") or op in ("parallel_block_prefill", "parallel_block_decode")
    assert ({"forward"} if forward_only else {"forward", "forward+backward"}) <= directions


@pytest.mark.parametrize("unit", ["parallel_block", "model-loss", "micro-step", "train-step", "prefill", "decode",
                                  "data-loader", "tokenise", "load", "save"])
def test_every_unit_of_work_has_cases(unit):
    assert select("cpu", [unit])
    assert select("cuda", [unit])


def test_the_lengths_head_sizes_and_variants_of_attention():
    cases = select("cuda", ["attention"])
    assert {512, 1024, 2048, 4096, 8192, 16384} <= {case.shape["T"] for case in cases}
    assert {case.shape["K"] for case in cases} == {64, 80, 128}
    for causal in (False, True):
        assert {2048, 16384} <= {case.shape["T"] for case in cases if case.shape["causal"] is causal}
    assert any(case.shape.get("dropout") == 0.1 for case in cases)
    assert any("documents" in case.shape for case in select("cuda", ["attention_qkv"]))
    peers = {provider.name for case in cases for provider in case.providers}
    assert {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "flex", "flash-attn", "flash-attn-4"} <= peers


@pytest.mark.slow
def test_a_compiled_layer_has_the_attention_that_is_forced(monkeypatch):
    pytest.importorskip("transformers")
    from torch._dynamo.backends.common import aot_autograd

    operators, compile_with = [], torch.compile

    def noted(graph, inputs):
        operators.append({node.target._opname for node in graph.graph.nodes if hasattr(node.target, "_opname")})
        return graph

    compiler = aot_autograd(fw_compiler=noted)
    monkeypatch.setattr(torch, "compile",
                        lambda function, dynamic, mode: compile_with(function, dynamic=dynamic, backend=compiler))
    case = next(case for case in SMALL if case.op == "parallel_block" and case.direction == "forward")
    with torch.no_grad():
        for backend in ("", "MATH"):
            layer = block._compiled_layer(2, 4, 0.0, "default", backend)(case, CPU)
            layer(draw(case))
    assert ["_scaled_dot_product_flash_attention_for_cpu" in found for found in operators] == [True, False]


def test_cases_are_well_formed():
    for case in all_cases():
        assert case.n_bytes > 0, case.name
        assert case.n_flops > 0 or case.unit == "host", case.name
        assert len({provider.name for provider in case.providers}) == len(case.providers) > 1, case.name
        assert {provider.package for provider in case.providers} <= {"torch", "phi1", *VERSIONS}, case.name
        assert all(set(provider.by_default) <= set(provider.devices) for provider in case.providers), case.name
        assert case.leaves or case.direction not in check.GRADIENTS, case.name


@pytest.mark.parametrize("case", [case for case in SMALL if case.direction == "forward"], ids=lambda case: case.name)
def test_a_forward_moves_at_least_its_inputs_and_outputs(case):
    """The formula of the bytes is not less than what the tensors hold, and not much more."""
    inputs = draw(case)
    moved = [x for name, x in inputs.items() if isinstance(x, torch.Tensor) and name in case.leaves]
    moved += check.as_tuple(case.reference(inputs))
    size = sum(x.numel() for x in moved) * ELEMENT_BYTES[case.dtype]
    # In place a quarter moves: R of K dimensions of q and k, of q, k and v.
    share = case.n_bytes / size
    assert 0.75 <= share <= 1.25 or (case.op == "rotary_" and 0.25 <= share <= 0.75)


@pytest.mark.parametrize("case", [case for case in SMALL if case.direction == "forward+backward"
                                  and case.n_flops > 20 * case.n_bytes and "documents" not in case.shape],
                         ids=lambda case: case.name)
def test_flops_of_products_are_what_pytorch_counts(case):
    """The operations that multiply matrices; attention counts the causal half, which PyTorch does not skip."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = check.leaves_of(case, draw(case))
    # The case's own reference goes by parts, and computes each of them again for the backward.
    whole = reference_of(case.providers[0].prepare(case, CPU))
    with FlopCounterMode(display=False) as counter:
        outputs = check.as_tuple(whole(inputs))
        check.gradients(case, inputs, outputs, check.upstream_of(outputs, 0))
    counted = counter.get_total_flops()
    # The reference multiplies all of the scores forward and backward, four products of six in all.
    scores = {"attention": 12 / 7, "attention_qkv": 12 / 7}.get(case.op, 1.0)
    assert case.n_flops * scores == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_inputs_are_a_function_of_the_seed(case):
    first, again = draw(case), draw(case)
    other = case.draw(CPU, 2)
    assert all(torch.equal(first[name], again[name]) for name in case.leaves if first[name] is not None)
    assert not torch.equal(first[case.leaves[0]], other[case.leaves[0]])


def test_documents_fill_the_rows():
    lengths = document_lengths(16384)
    assert sum(lengths) == 16384
    assert 1 <= min(lengths) <= max(lengths) <= 2048
    assert lengths == document_lengths(16384)


def test_selections():
    quick = select("cuda", quick=True)
    assert {case.op for case in quick} == set(operations()), "the short selection covers everything"
    assert len(quick) < len(select("cuda"))
    assert all("T=512" in case.name for case in select("cuda", ["attention"], text="T=512 "))
    assert {case.unit for case in select("cpu", units=["host"])} == {"host"}
    with pytest.raises(ValueError, match="--op: there is no case of 'layernorm'; there are layer_norm, "):
        select("cpu", ["layernorm"])
    with pytest.raises(ValueError, match="no case for the cpu has this operation, unit and name"):
        select("cpu", ["layer_norm"], text="no such words")


def test_formulas_see_the_sizes_and_the_element():
    case = replace(make(), shape={"N": 3, "p": 0.1}, dtype="float16", flops="N*N")
    assert (case.n_bytes, case.n_flops) == (12, 9)


@pytest.mark.parametrize("case", [case for case in (*SMALL, *block.small_block(p=0.1))
                                  if case.direction == "forward+backward"], ids=lambda case: case.name)
def test_references_by_parts_are_the_reference(case):
    """With every gradient, in float64: whole and by parts differ by the order of sums alone."""
    inputs = {name: x.double() if name in case.leaves and x is not None else x for name, x in draw(case).items()}
    whole = reference_of(case.providers[0].prepare(case, CPU))
    exact, parts = (check.results(case, function, inputs) for function in (whole, case.reference))
    assert exact.keys() == parts.keys()
    for name, x in exact.items():
        assert torch.allclose(x, parts[name], rtol=1e-9, atol=1e-12), name
