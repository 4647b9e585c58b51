"""Small tiles for attention's kernels, so that short inputs have several."""

from importlib import import_module

import pytest


@pytest.fixture
def use_tile(monkeypatch):
    """Gives attention's kernels one tile for every launch."""
    def use(block_m=32, block_n=64, rotate_on_load=0, tma=0):
        tile = {"block_m": block_m, "block_n": block_n, "rotate_on_load": rotate_on_load, "num_warps": 4,
                "num_stages": 2, "tma": tma}
        monkeypatch.setattr(import_module("phi1.kernels.attention.launch_triton"), "tile", lambda *_, **__: tile)

    return use


@pytest.fixture(autouse=True)
def _small_tiles(request, use_tile):
    if request.node.get_closest_marker("triton"):
        use_tile()
