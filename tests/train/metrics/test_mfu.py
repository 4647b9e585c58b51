"""Model FLOP utilisation, for GPUs with known peaks and for others."""

from pathlib import Path

import pytest
import torch

from phi1.train.metrics.mfu import Mfu
from phi1.train.recipe.file import read_recipe
from phi1.train.runtime.engine import Engine

BASE = read_recipe(Path(__file__).parents[3] / "train" / "configs" / "phi1-base.toml", {})


@pytest.mark.parametrize(("precision", "expected"), [("fp16", 0.505), ("fp32", 0.505 * 312 / 19.5)])
def test_mfu_of_a_known_gpu_and_of_none(monkeypatch, precision, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    engine = Engine(torch.device("cuda", 0), precision, 1, 8)
    found = Mfu.of_run(BASE.phi1_config(), BASE.data.seq_len, engine).of(8 * 0.505 * 312e12 / 9.0884e9)
    assert found["mfu"] == pytest.approx(expected, rel=1e-3)
    assert found["mfu_causal"] == pytest.approx(expected * 8.484 / 9.088, rel=1e-3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert Mfu.of_run(BASE.phi1_config(), BASE.data.seq_len, engine).of(1e5) == {}
    assert Mfu.of_run(BASE.phi1_config(), BASE.data.seq_len, Engine(torch.device("cpu"), "fp32", 2, 1)).of(1e5) == {}
