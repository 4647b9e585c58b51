"""What the compile gate compiles of attention: each row of the table of tiles, with and without dropout."""

import os
import sys
from itertools import product

import pytest

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton compiles on Linux, and not in its interpreter", allow_module_level=True)

from phi1.bench.compile import attention
from phi1.bench.compile.gate import ARCHS
from phi1.kernels.core import tiles

BITS, HEAD_SIZES, YES_NO = (16, 32), (16, 64, 80, 128), (False, True)


def reached(arch, kernel, **shape):
    """What of the table a lookup compiles: the row, and what else of the shape changes its code most."""
    found = tiles.first_fit("attention", kernel, "", arch, tuple(sorted(shape.items())))
    if arch == "sm_80" and found["gpu"] == "any":  # other GPUs of NVIDIA's take it with the same instructions
        arch = "any"
    row = tiles.table("attention")[kernel].index(found)
    return arch, kernel, row, shape["bits"], shape["head_size"] > 64, shape["dropout"]


def test_the_gate_compiles_every_row_with_and_without_dropout(monkeypatch):
    compiled = set()

    def looked_up(op, kernel, arch, **shape):
        compiled.add(reached(arch, kernel, **shape))
        return tiles.tile_for(op, kernel, arch, **shape)

    monkeypatch.setattr(attention, "tile_for", looked_up)
    for arch in ARCHS:
        attention.cases(arch)
    launched = {
        reached(arch, kernel, bits=bits, head_size=head_size, causal=causal, dropout=dropout, rotates=rotates,
                packed=packed)
        for arch, kernel in product((*ARCHS, "any"), attention.KERNELS)
        for bits, head_size in product(BITS, HEAD_SIZES)
        for causal, dropout, rotates, packed in product(YES_NO, repeat=4)
    }
    rows = tiles.table("attention")
    assert {(kernel, row) for _, kernel, row, *_ in launched} == {(k, i) for k in rows for i in range(len(rows[k]))}
    assert sorted(launched - compiled) == []
