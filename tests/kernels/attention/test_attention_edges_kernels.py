"""The Triton kernels of attention at the edges: no look-ahead, NaN and unchecked values stay where they are, empty
input, the same bits each time, sound operators, refusals. On a GPU or in Triton's interpreter (run by
test_interpreter.py).
"""

import math

import pytest
import torch

from phi1 import testing
from phi1.kernels import Dropout, attention, attention_qkv, backend, check_values
from phi1.kernels.attention import launch_triton
from phi1.kernels.attention.attention import attention_reference
from phi1.kernels.attention.attention_qkv import attention_qkv_reference
from phi1.kernels.core.tiles import TILES, table
from phi1.testing import attention_inputs, qkv_inputs, rotary_tables

DEVICE = testing.kernel_device()
if DEVICE is None:
    pytest.skip("no GPU: test_interpreter.py runs these", allow_module_level=True)

TILE = {"block_m": 32, "block_n": 64, "rotate_on_load": 0, "num_warps": 4, "num_stages": 2, "tma": 0,
        "warp_specialize": 0}
RNG = torch.tensor([5, 7], device=DEVICE)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(launch_triton, "tile", lambda *_, **__: TILE)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def test_causal_means_no_look_ahead():
    tensors = attention_inputs((2, 80, 80, 2, 16))
    with backend("triton"):
        before = attention(**tensors)
        for name in ("k", "v"):
            tensors[name][:, 37:] += 1
        after = attention(**tensors)
    assert torch.equal(before[:, :37], after[:, :37])
    assert not torch.allclose(before[:, 37:], after[:, 37:])


def test_nan_in_another_document_or_in_padding_stays_there():
    tensors = attention_inputs((1, 60, 60, 2, 16))
    for x in tensors.values():
        x[:, 21:40] = math.nan
    with backend("triton"):
        got = testing.outputs_and_gradients(attention, tensors, cu_seqlens=ints(0, 21, 40, 60))
    for name, x in got.items():
        assert x[:, :21].isfinite().all(), name
        assert x[:, 40:].isfinite().all(), name
        assert x[:, 21:40].isnan().all(), name
    tensors = attention_inputs((2, 60, 60, 2, 16))
    for name in ("k", "v"):
        tensors[name][1, :35] = math.nan
    with backend("triton"):
        got = testing.outputs_and_gradients(attention, tensors, seq_starts=ints(0, 35))
    assert all(x.isfinite().all() for x in got.values())


def test_large_scores_stay_finite():
    tensors = attention_inputs((1, 70, 70, 2, 64), torch.float16)
    tensors = {name: x * (300 if name != "v" else 1) for name, x in tensors.items()}
    with backend("triton"):
        got = testing.outputs_and_gradients(attention, tensors, causal=False)
    assert all(x.isfinite().all() for x in got.values())
    exact = attention_reference(**{name: x.double() for name, x in tensors.items()}, causal=False)
    testing.assert_within_bound(got["out0"], attention_reference(**tensors, causal=False), exact, roundings=4)


def test_rows_of_no_document_are_nan():
    tensors = attention_inputs((1, 80, 80, 2, 16))
    with backend("triton"), check_values(False), testing.empty_is_nan():
        got = testing.outputs_and_gradients(attention, tensors, cu_seqlens=ints(5, 36, 60))
    with backend("reference"):
        alone = {name: x[:, 5:36] for name, x in tensors.items()}
        expected = attention(**alone)
    torch.testing.assert_close(got["out0"][:, 5:36], expected)
    for name, x in got.items():
        assert x[:, 5:60].isfinite().all(), name
        assert x[:, :5].isnan().all(), name
        assert x[:, 60:].isnan().all(), name


@pytest.mark.parametrize("cuts", [(0, 50, 20, 70), (-4, 30, 99), (0,), (99, 0)], ids=str)
def test_wild_cu_seqlens_stay_inside(cuts):
    tensors = attention_inputs((1, 70, 70, 1, 16))
    guarded = {name: torch.nn.functional.pad(x, (0, 0, 0, 0, 9, 9), value=math.nan)[:, 9:-9]
               for name, x in tensors.items()}
    with backend("triton"), check_values(False):
        got = testing.outputs_and_gradients(attention, guarded, cu_seqlens=ints(*cuts))
    assert got["out0"].shape == (1, 70, 1, 16)
    seen = max(0, min(70, max(cuts)) - max(0, cuts[0]))
    assert got["out0"][0, :, 0, 0].isfinite().sum() == seen


def test_wild_positions_give_nan():
    positions = torch.arange(34, device=DEVICE)
    positions[20], positions[30] = 34, -1
    with backend("triton"), check_values(False):
        out = attention_qkv(**qkv_inputs(34), rotary=rotary_tables(8, 34), positions=positions)
    assert out[:20].isfinite().all()
    assert out[20].isnan().all()


def test_a_token_alone_attends_to_itself():
    tensors = attention_inputs((2, 1, 1, 2, 64))
    with backend("triton"):
        found = testing.outputs_and_gradients(attention, tensors)
    assert torch.equal(found["out0"], tensors["v"])
    # P is 1 whatever q and k are; what is left of dP - delta is a rounding of sums of 64 products.
    assert all(found[name].abs().max() < 64 * torch.finfo(torch.float32).eps * 10 for name in ("dq", "dk"))
    assert found["dv"].abs().min() > 0


def test_empty_input():
    check = testing.assert_matches_reference
    with backend("triton"):
        for shape in ((0, 3, 3, 2, 16), (2, 0, 0, 2, 16), (2, 0, 5, 2, 16)):
            check(attention, attention_reference, attention_inputs(shape))
        check(attention, attention_reference, attention_inputs((2, 0, 0, 2, 16)), cu_seqlens=ints(0))
        check(attention_qkv, attention_qkv_reference, qkv_inputs(0), rotary=rotary_tables(8))


def test_backward_is_bitwise_repeatable():
    tensors, options = attention_inputs((1, 70, 70, 2, 16), torch.float16), {"dropout": Dropout(0.2, RNG)}
    with backend("triton"):
        first, second = (testing.outputs_and_gradients(attention, tensors, **options) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_kernels_ran_and_not_pytorch(monkeypatch):
    from phi1.kernels.attention import launch_triton

    launched = []
    for name in ("launch_attention_forward", "launch_attention_backward"):
        launch = getattr(launch_triton, name)
        monkeypatch.setattr(
            launch_triton, name, lambda *a, launch=launch, name=name: launched.append(name) or launch(*a)
        )
    with backend("triton"):
        testing.outputs_and_gradients(attention, attention_inputs((1, 4, 4, 1, 16)))
        testing.outputs_and_gradients(attention_qkv, qkv_inputs(4))
    assert launched == ["launch_attention_forward", "launch_attention_backward"] * 2


def test_what_the_kernels_do_not_take_raises():
    refusal = r"a head size of at most 128; got 129; backend\('reference'\)"
    with backend("triton"), pytest.raises(NotImplementedError, match=refusal):
        attention(**attention_inputs((1, 3, 3, 1, 129)))


def test_operators_are_sound_and_compile_whole():
    q, k, v = (x.requires_grad_() for x in attention_inputs((2, 9, 9, 2, 16)).values())
    qkv = qkv_inputs(12)["qkv"].requires_grad_()
    positions = torch.arange(12, device=DEVICE)
    with backend("triton"):
        testing.assert_operator_is_sound("attention", (q, k, v, None, ints(0, 2), True, 0.25, 0.5, RNG, None, 1, 0))
        testing.assert_operator_is_sound(
            "attention_qkv",
            (qkv, *rotary_tables(8), positions, ints(0, 5, 12), None, 1, True, 0.25, True, 0.5, RNG, None, 1, 0),
        )
        testing.assert_compiles_whole(attention_qkv, qkv_inputs(12), batch=2, rotary=rotary_tables(8))


def test_activation_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    options = {"batch": 2, "rotary": rotary_tables(8), "dropout": Dropout(0.2, RNG)}
    with backend("triton"):
        plain = testing.outputs_and_gradients(attention_qkv, qkv_inputs(34), **options)
        again = testing.outputs_and_gradients(
            lambda qkv: checkpoint(attention_qkv, qkv, use_reentrant=False, **options), qkv_inputs(34))
    assert all(torch.equal(x, again[name]) for name, x in plain.items())


def test_every_tile_of_the_table_and_of_the_tuner_can_hold_a_dropout_mask():
    for kernel, rows in table("attention").items():
        assert (rows[-1]["gpu"], rows[-1]["when"]) == ("any", {}), kernel
        candidates = TILES["attention", kernel]
        for tile in [row["tile"] for row in rows] + candidates:
            assert tile.keys() == candidates[0].keys(), (kernel, tile)
            assert tile["block_m"] >= 16, (kernel, tile)
            assert tile["block_n"] == 32 or tile["block_n"] % 64 == 0, (kernel, tile)
