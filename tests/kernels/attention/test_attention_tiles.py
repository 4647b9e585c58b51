"""attention's Triton kernels: any tile, TMA, rotary size and document gives what the reference gives, and values that
nobody has checked stay where they are.

Tiles are small here, so that short inputs have several; a GPU is also given the tiles of the table.
"""

import math

import pytest
import torch
from kernel_checks import (
    DTYPES,
    DTYPES_OF_PRODUCTS,
    assert_compiles_whole,
    assert_matches_reference,
    assert_operator_is_sound,
    attention_inputs,
    kernel_device,
    outputs_and_gradients,
    qkv_inputs,
    rotary_tables,
)

from phi1.kernels import Dropout, attention, attention_qkv, check_values
from phi1.kernels.attention.attention import attention_reference
from phi1.kernels.attention.attention_qkv import attention_qkv_reference
from phi1.kernels.core.tiles import TILES, table

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("device")]
DEVICE = kernel_device()
SHAPES = [(2, 17, 17, 2, 32), (1, 33, 33, 2, 64), (2, 1, 33, 2, 64), (2, 5, 40, 2, 80)]  # B, Tq, Tk, H, K
RNG = torch.tensor([5, 7], device=DEVICE)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def check(tensors, **options):
    """The tolerance rule; test_attention.py says why float32 gets 8 roundings."""
    operation, reference = ((attention_qkv, attention_qkv_reference) if "qkv" in tensors else
                            (attention, attention_reference))
    roundings = 8 if next(iter(tensors.values())).dtype == torch.float32 else 4
    assert_matches_reference(operation, reference, tensors, roundings=roundings, **options)


@pytest.mark.not_interpreted  # which would take minutes for tiles of this size
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [16, 64, 80, 128])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_tables_tiles_match_reference(monkeypatch, head_size, dtype, p):
    monkeypatch.undo()
    check(attention_inputs((2, 300, 300, 2, head_size), dtype), dropout=Dropout(p, RNG))
    check(qkv_inputs(600, 2, head_size, dtype), batch=2, rotary=rotary_tables(16, 300), dropout=Dropout(p, RNG))


@pytest.mark.parametrize("tile", [(16, 32), (32, 32), (64, 32), (32, 128)], ids=str)
def test_the_tile_is_not_seen(use_tile, tile):
    use_tile(*tile)
    check(attention_inputs((1, 70, 75, 1, 16)))
    check(attention_inputs((1, 70, 75, 1, 16)), dropout=Dropout(0.3, RNG))
    check(attention_inputs((1, 70, 70, 1, 16), torch.float16), cu_seqlens=ints(0, 1, 1, 34, 70))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[0], [1], [0, 40, 0], [16, 1, 0, 33, 7], [32, 32]], ids=str)
def test_any_documents_match_reference(lengths, causal):
    cuts = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    n_rows = sum(lengths)
    if n_rows == 1:  # dq and dk are differences of equal numbers
        qkv = qkv_inputs(1, 1)["qkv"]
        assert torch.equal(attention_qkv(qkv, cu_seqlens=cuts, causal=causal), qkv[:, 2, 0])
    else:
        check(qkv_inputs(n_rows, 1), cu_seqlens=cuts, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
@pytest.mark.parametrize(("head_size", "rotary_size"), [(16, 6), (32, 12), (80, 20), (24, 24)])
@pytest.mark.parametrize("mode", ["inside", "on load", "applied"])
def test_rotary_sizes_that_are_no_powers_of_two_match_reference(use_tile, mode, head_size, rotary_size, dtype):
    use_tile(rotate_on_load=int(mode == "on load"))
    check(qkv_inputs(34, 1, head_size, dtype), rotary=rotary_tables(rotary_size), rotary_applied=mode == "applied",
          cu_seqlens=ints(0, 1, 34))


@pytest.mark.parametrize("rotary_size", [2, 64])
def test_rotary_sizes_and_positions_match_reference(rotary_size):
    positions = torch.randint(150, (34,), device=DEVICE)
    check(qkv_inputs(34, 1, 80), rotary=rotary_tables(rotary_size), positions=positions)
    check(qkv_inputs(34, 1, 64), rotary=rotary_tables(rotary_size), positions=positions.int(), rotary_applied=True)


@pytest.fixture
def described(monkeypatch, use_tile):
    """A tile that reads by TMA: the list of whether each launch does."""
    from phi1.kernels.attention import launch_triton

    use_tile(tma=1)
    taken, kernel = [], launch_triton.attention_forward_kernel

    class Noted:
        def __getitem__(self, grid):
            return lambda *a, **k: taken.append(k["TMA"]) or kernel[grid](*a, **k)

    monkeypatch.setattr(launch_triton, "attention_forward_kernel", Noted())
    return taken


@pytest.mark.parametrize("dtype", DTYPES_OF_PRODUCTS, ids=str)
def test_tiles_that_read_by_tma_match_reference(described, dtype):
    for shape in SHAPES:
        check(attention_inputs(shape, dtype))
    check(attention_inputs((2, 100, 70, 1, 16), dtype), causal=False)
    check(qkv_inputs(51, 2, 32, dtype), batch=3)
    check(qkv_inputs(51, 1, 16, dtype), batch=3, rotary=rotary_tables(8), rotary_applied=True)
    check(attention_inputs(SHAPES[0], dtype), dropout=Dropout(0.2, RNG))
    assert all(described)


def test_tma_reads_no_other_sample_and_leaves_what_it_cannot_mask_to_pointers(described):
    tensors = attention_inputs((3, 40, 40, 2, 16))
    for x in tensors.values():
        x[1:] = math.nan
    assert attention(**tensors)[0].isfinite().all()  # its last tile of keys reaches into the next sample
    assert described.pop()
    check(attention_inputs((1, 40, 40, 2, 16)), cu_seqlens=ints(0, 11, 40))
    check(attention_inputs((2, 40, 40, 2, 16)), seq_starts=ints(0, 7))
    check(attention_inputs((2, 9, 9, 2, 18)))  # heads that start at no multiples of 16 bytes
    check(qkv_inputs(51, 1, 16), batch=3, rotary=rotary_tables(8))
    wide = torch.randn(2, 20, 2, 17, device=DEVICE)[..., 1:]
    check({"q": wide, "k": wide + 1, "v": wide})
    assert described
    assert not any(described)


def test_nan_in_padding_is_never_read():
    tensors = attention_inputs((2, 60, 60, 2, 16))
    for name in ("k", "v"):
        tensors[name][1, :35] = math.nan
    got = outputs_and_gradients(attention, tensors, seq_starts=ints(0, 35))
    assert all(x.isfinite().all() for x in got.values())


@pytest.mark.parametrize("cuts", [(0, 50, 20, 70), (-4, 30, 99), (0,), (99, 0)], ids=str)
def test_wild_cu_seqlens_stay_inside(cuts):
    tensors = attention_inputs((1, 70, 70, 1, 16))
    guarded = {name: torch.nn.functional.pad(x, (0, 0, 0, 0, 9, 9), value=math.nan)[:, 9:-9]
               for name, x in tensors.items()}
    with check_values(False):
        got = outputs_and_gradients(attention, guarded, cu_seqlens=ints(*cuts))
    assert got["out0"].shape == (1, 70, 1, 16)
    seen = max(0, min(70, max(cuts)) - max(0, cuts[0]))
    assert got["out0"][0, :, 0, 0].isfinite().sum() == seen


def test_wild_positions_give_nan():
    positions = torch.arange(34, device=DEVICE)
    positions[20], positions[30] = 34, -1
    with check_values(False):
        out = attention_qkv(**qkv_inputs(34), rotary=rotary_tables(8, 34), positions=positions)
    assert out[:20].isfinite().all()
    assert out[20].isnan().all()


def test_what_the_kernels_do_not_take_raises():
    refusal = r"a head size of at most 128; got 129; backend\('reference'\)"
    with pytest.raises(NotImplementedError, match=refusal):
        attention(**attention_inputs((1, 3, 3, 1, 129)))


def test_operators_are_sound_and_compile_whole():
    q, k, v = (x.requires_grad_() for x in attention_inputs((2, 9, 9, 2, 16)).values())
    qkv = qkv_inputs(12)["qkv"].requires_grad_()
    positions = torch.arange(12, device=DEVICE)
    assert_operator_is_sound("attention", (q, k, v, None, ints(0, 2), True, 0.25, 0.5, RNG, None, 1, 0))
    assert_operator_is_sound(
        "attention_qkv",
        (qkv, *rotary_tables(8), positions, ints(0, 5, 12), None, 1, True, 0.25, True, 0.5, RNG, None, 1, 0),
    )
    assert_compiles_whole(attention_qkv, qkv_inputs(12), batch=2, rotary=rotary_tables(8))


def test_every_tile_of_the_table_and_of_the_tuner_can_hold_a_dropout_mask():
    for kernel, rows in table("attention").items():
        assert (rows[-1]["gpu"], rows[-1]["when"]) == ("any", {}), kernel
        candidates = TILES["attention", kernel]
        for tile in [row["tile"] for row in rows] + candidates:
            assert tile.keys() == candidates[0].keys(), (kernel, tile)
            assert tile["block_m"] >= 16, (kernel, tile)
            assert tile["block_n"] == 32 or tile["block_n"] % 64 == 0, (kernel, tile)
