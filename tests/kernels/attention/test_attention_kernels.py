"""The Triton kernels of attention give what the reference gives, outputs and gradients: for any shape, packing, rotary
mode, dropout, tile and stride, on a GPU or in Triton's interpreter (run by test_interpreter.py).

The interpreter multiplies bfloat16 wrongly, so that bfloat16 is tested on a GPU alone. Tiles are small here, so that
short inputs have several; a GPU is also given the tiles of the table.
"""

import math

import pytest
import torch
from kernel_checks import DTYPES, assert_matches_reference, attention_inputs, kernel_device, qkv_inputs, rotary_tables

from phi1.kernels import Dropout, attention, attention_qkv, backend
from phi1.kernels.attention import launch_triton
from phi1.kernels.attention.attention import attention_reference
from phi1.kernels.attention.attention_qkv import attention_qkv_reference
from phi1.kernels.core.philox import attention_keep

pytestmark = pytest.mark.triton
DEVICE = kernel_device()

DTYPES = DTYPES if DEVICE == "cuda" else DTYPES[:2]
SHAPES = [  # B, Tq, Tk, H, K
    (1, 3, 3, 1, 16),  # the smallest whose gradients are not differences of equal numbers
    (2, 17, 17, 2, 32),
    (1, 31, 31, 1, 64),  # one row less than a block
    (1, 33, 33, 2, 64),  # one more
    (1, 100, 100, 1, 16),  # several blocks of both sizes
    (2, 1, 33, 2, 64),  # decoding
    (2, 5, 40, 2, 80),  # several tokens after a cache; a head padded to 128
    (1, 20, 21, 1, 96),
    (1, 34, 40, 1, 128),
    (2, 9, 9, 1, 24),  # no power of two
]
TILE = (32, 64)
TILES = [(16, 32), (32, 32), (64, 32), (32, 128)]
RNG = torch.tensor([5, 7], device=DEVICE)


def use_tile(monkeypatch, block_m=TILE[0], block_n=TILE[1], rotate_on_load=0, tma=0, warp_specialize=0):
    small = {"block_m": block_m, "block_n": block_n, "rotate_on_load": rotate_on_load, "num_warps": 4, "num_stages": 2,
             "tma": tma, "warp_specialize": warp_specialize}
    monkeypatch.setattr(launch_triton, "tile", lambda *_, **__: small)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    use_tile(monkeypatch)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def roundings(tensors):
    """The scale and log2(e) are folded into the exponent: one more rounding of every score.

    In float32, dP - delta is a difference of two sums of K products in different orders, for a kernel that has parts of
    rows takes rowsum(dout out) for rowsum(P dP): where a query sees one key it should be 0 and is 3 roundings of dP. Of
    these tests two need more than 4 roundings for it; in 16 bits it is far below one.
    """
    return 8 if next(iter(tensors.values())).dtype == torch.float32 else 4


def check(tensors, **options):
    with backend("triton"):
        assert_matches_reference(attention, attention_reference, tensors, roundings=roundings(tensors),
                                         **options)


def check_qkv(tensors, **options):
    with backend("triton"):
        assert_matches_reference(attention_qkv, attention_qkv_reference, tensors,
                                         roundings=roundings(tensors), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_causal_attention_matches_reference(shape, dtype):
    check(attention_inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[1:5], (1, 40, 20, 1, 16)], ids=str)  # full: more queries than keys too
def test_full_attention_matches_reference(shape, dtype):
    check(attention_inputs(shape, dtype), causal=False, scale=0.3)


if DEVICE == "cuda":  # the interpreter needs minutes for tiles of this size

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("head_size", [16, 64, 80, 128])
    @pytest.mark.parametrize("p", [0.0, 0.2])
    def test_the_tables_tiles_match_reference(monkeypatch, head_size, dtype, p):
        monkeypatch.undo()
        check(attention_inputs((2, 300, 300, 2, head_size), dtype), dropout=Dropout(p, RNG))
        check_qkv(qkv_inputs(600, 2, head_size, dtype), batch=2, rotary=rotary_tables(16, 300), dropout=Dropout(p, RNG))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_tile_is_not_seen(monkeypatch, tile):
    use_tile(monkeypatch, *tile)
    check(attention_inputs((1, 70, 75, 1, 16)))
    check(attention_inputs((1, 70, 75, 1, 16)), dropout=Dropout(0.3, RNG))
    check(attention_inputs((1, 70, 70, 1, 16), torch.float16), cu_seqlens=ints(0, 1, 1, 34, 70))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_match_reference(causal, dtype):
    cuts = ints(0, 1, 1, 20, 53, 54, 75)  # documents of 1 and of no rows
    check(attention_inputs((1, 75, 75, 2, 16), dtype), causal=causal, cu_seqlens=cuts)
    check(attention_inputs((3, 25, 25, 1, 16), dtype), causal=causal, cu_seqlens=cuts.long(),
          dropout=Dropout(0.2, RNG, ints(9, 8, 7, 6, 5, 4, dtype=torch.int64)[: cuts.shape[0] - 1]))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[0], [1], [0, 40, 0], [16, 1, 0, 33, 7], [32, 32]], ids=str)
def test_any_documents_match_reference(lengths, causal):
    cuts = torch.tensor([0, *lengths]).cumsum(0).to(DEVICE)
    n_rows = sum(lengths)
    if n_rows > 1:  # of one row alone, dq and dk are differences of equal numbers
        check_qkv(qkv_inputs(n_rows, 1), cu_seqlens=cuts, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[5], (2, 40, 70, 1, 16)], ids=str)
def test_left_padding_matches_reference(shape, causal, dtype):
    check(attention_inputs(shape, dtype), causal=causal, seq_starts=ints(0, 12))
    # A row of padding alone.
    check(attention_inputs(shape, dtype), causal=causal, seq_starts=ints(3, shape[2], dtype=torch.int64))


PACKINGS = {
    "batch": {"batch": 3},
    "full": {"batch": 3, "causal": False},
    "packed": {"cu_seqlens": ints(0, 1, 1, 36, 51)},
    "left-padded": {"batch": 3, "seq_starts": ints(0, 5, 16)},
    "dropout": {"batch": 3, "dropout": Dropout(0.3, RNG, ints(8, 2, 3, dtype=torch.int64), layer=0xFFFF, kind=9)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("mode", ["none", "inside", "on load", "applied"])
def test_rotary_modes_match_reference(monkeypatch, mode, packing, dtype):
    use_tile(monkeypatch, rotate_on_load=int(mode == "on load"))
    options = {} if mode == "none" else {"rotary": rotary_tables(8), "rotary_applied": mode == "applied"}
    check_qkv(qkv_inputs(51, 1, 16, dtype), **PACKINGS[packing], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "rotary_size"), [(16, 6), (32, 12), (80, 20), (24, 24)])
@pytest.mark.parametrize("mode", ["inside", "on load", "applied"])
def test_rotary_sizes_that_are_no_powers_of_two(monkeypatch, mode, head_size, rotary_size, dtype):
    use_tile(monkeypatch, rotate_on_load=int(mode == "on load"))
    check_qkv(qkv_inputs(34, 1, head_size, dtype), rotary=rotary_tables(rotary_size), rotary_applied=mode == "applied",
              cu_seqlens=ints(0, 1, 34))


@pytest.mark.parametrize("rotary_size", [2, 64])
def test_rotary_sizes_and_positions(rotary_size):
    positions = torch.randint(150, (34,), device=DEVICE)
    check_qkv(qkv_inputs(34, 1, 80), rotary=rotary_tables(rotary_size), positions=positions)
    check_qkv(qkv_inputs(34, 1, 64), rotary=rotary_tables(rotary_size), positions=positions.int(), rotary_applied=True)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_dropout_is_the_mask_of_the_specification(monkeypatch, tile):
    use_tile(monkeypatch, *tile)
    dropout = Dropout(0.4, RNG, ints(4, 1 << 40 | 77, dtype=torch.int64), layer=3, kind=1)
    v = torch.eye(70, device=DEVICE)[None, :, None].expand(2, -1, 3, -1)  # shows the probabilities; all scores are 0
    with backend("triton"):
        p = attention(torch.zeros_like(v), torch.zeros_like(v), v, causal=False, dropout=dropout).transpose(1, 2)
    keep = attention_keep(dropout, samples=range(2), heads=range(3), queries=range(70), keys=range(70))
    assert torch.equal(p != 0, keep)
    torch.testing.assert_close(p[keep], torch.full_like(p[keep], 65536 / (65536 - round(0.4 * 65536)) / 70))


def described(monkeypatch, kind):
    """The tile of a candidate that reads by TMA; which of the two kinds of loop each launch takes is noted."""
    from phi1.kernels.attention import launch_triton

    use_tile(monkeypatch, tma=1, warp_specialize=int(kind == "warp-specialised"))
    taken, kernel = [], launch_triton.attention_forward_kernel

    class Noted:
        def __getitem__(self, grid):
            return lambda *a, **k: taken.append((k["TMA"], k["WARP_SPECIALIZE"])) or kernel[grid](*a, **k)

    monkeypatch.setattr(launch_triton, "attention_forward_kernel", Noted())
    return taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["tma", "warp-specialised"])
def test_tiles_that_read_by_tma_match_reference(monkeypatch, kind, dtype):
    taken, special = described(monkeypatch, kind), kind == "warp-specialised"
    for shape in (SHAPES[1], SHAPES[3], SHAPES[5], SHAPES[6]):
        check(attention_inputs(shape, dtype))
    check(attention_inputs((2, 100, 70, 1, 16), dtype), causal=False)
    check_qkv(qkv_inputs(51, 2, 32, dtype), batch=3)
    check_qkv(qkv_inputs(51, 1, 16, dtype), batch=3, rotary=rotary_tables(8), rotary_applied=True)
    assert set(taken) == {(True, special)}
    check(attention_inputs(SHAPES[1], dtype), dropout=Dropout(0.2, RNG))
    check_qkv(qkv_inputs(51, 1, 16, dtype), batch=3, rotary=rotary_tables(8))
    assert taken[-2:] == [(True, False)] * 2  # these two compile without warp specialisation alone


@pytest.mark.parametrize("kind", ["tma", "warp-specialised"])
def test_tma_reads_no_other_sample_and_leaves_what_it_cannot_mask_to_pointers(monkeypatch, kind):
    taken = described(monkeypatch, kind)
    tensors = attention_inputs((3, 40, 40, 2, 16))
    for x in tensors.values():
        x[1:] = math.nan
    with backend("triton"):
        assert attention(**tensors)[0].isfinite().all()  # its last tile of keys reaches into the next sample
    assert taken.pop()[0]
    check(attention_inputs((1, 40, 40, 2, 16)), cu_seqlens=ints(0, 11, 40))
    check(attention_inputs((2, 40, 40, 2, 16)), seq_starts=ints(0, 7))
    check(attention_inputs((2, 9, 9, 2, 18)))  # heads that start at no multiples of 16 bytes
    wide = torch.randn(2, 20, 2, 17, device=DEVICE)[..., 1:]
    check({"q": wide, "k": wide + 1, "v": wide})
    assert taken
    assert not any(tma for tma, _ in taken)


def test_dropout_counts_decoded_queries_and_negative_positions():
    tensors, dropout = attention_inputs((2, 40, 40, 2, 16)), Dropout(0.3, RNG)
    with backend("triton"):
        whole = attention(**tensors, dropout=dropout)
        last = attention(tensors["q"][:, -3:], tensors["k"], tensors["v"], dropout=dropout)
    torch.testing.assert_close(last, whole[:, -3:])
    check(attention_inputs((1, 40, 20, 1, 16)), causal=False, dropout=dropout)  # the first query is at -20


def test_non_contiguous_inputs():
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 64, 2, 16, generator=generator).to(DEVICE)
    q = torch.randn(2, 2, 4, 16, generator=generator).to(DEVICE).transpose(1, 2)
    check({"q": q, "k": cache[:, :20], "v": cache[:, 20:40].flip(3)})
    check({"q": cache[:, :9], "k": cache[:, 20:29], "v": cache[:, 40:49]}, cu_seqlens=ints(0, 11, 18))
    merged = torch.randn(34, 200, generator=generator).to(DEVICE)
    qkv = merged[:, 4:100].unflatten(1, (3, 2, 16))
    before = merged.clone()
    check_qkv({"qkv": qkv}, batch=2, rotary=rotary_tables(8))
    check_qkv({"qkv": qkv}, cu_seqlens=ints(0, 11, 34))
    assert torch.equal(merged, before)


def test_tables_masks_and_starts_of_any_strides():
    cos, sin = rotary_tables(8)
    apart = torch.stack((cos, sin), dim=-1)
    spread = torch.tensor([[5, 1], [7, 2]], device=DEVICE)
    options = {
        "rotary": (apart[..., 0], apart[..., 1]), "positions": torch.arange(68, device=DEVICE)[::2],
        "seq_starts": ints(0, 9, 5, 9)[::2], "dropout": Dropout(0.3, spread[:, 0], spread[:, 1]),
    }
    check_qkv(qkv_inputs(34), batch=2, **options)
