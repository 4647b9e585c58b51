"""What a step takes of memory, watched on tensors without values, whose bytes are counted."""

import os
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("counts what compiled kernels are given", allow_module_level=True)

from phi1.bench.gpu.step_memory import StepMemory
from phi1.bench.harness import counting
from phi1.config import preset
from phi1.model import Phi1
from phi1.train.plan import plan


class Memory(counting.Counter):
    """Stands in for torch.cuda's account of memory; what is made outside is not of it."""

    def __init__(self):
        super().__init__()
        self.held = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {counting.storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace != "phi1":
            for x in counting.tensors_of(out):
                self._hold(x.untyped_storage(), given)
        return out

    def _hold(self, storage, given):
        if storage._cdata not in self.known | given:
            self.known.add(storage._cdata)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
            self.held += storage.nbytes()
            self.most = max(self.most, self.held)

    def _free(self, storage, n_bytes):
        self.known.discard(storage)
        self.held -= n_bytes

    def memory_allocated(self):
        return self.held

    def max_memory_allocated(self):
        return self.most

    def reset_peak_memory_stats(self):
        self.most = self.held


def watched(monkeypatch, config, batch, tokens, micro_steps=2):
    memory = Memory()
    monkeypatch.setattr(counting, "Counter", lambda: memory)
    model = Phi1(config, device="meta", dtype=torch.float16)
    ids, sample_ids, rng = (torch.empty(shape, dtype=torch.int64, device="meta")
                            for shape in ((batch, tokens), (batch,), (2,)))
    watch = StepMemory(model, memory)
    with counting.counting():
        for _ in range(micro_steps):
            model.loss(ids, ids, rng=rng, sample_ids=sample_ids).backward()
    return model, watch, memory


@pytest.mark.parametrize(("dropout", "gib"), [(0.0, 1.80), (0.1, 1.82)])
def test_phi1s_activations_at_their_peak_are_a_little_more_than_is_kept(monkeypatch, dropout, gib):
    config = replace(preset("phi1"), attention_dropout=dropout, residual_dropout=dropout)
    _, watch, _ = watched(monkeypatch, config, 8, 2048)
    kept = plan.activations(config, 2048, 2)
    assert kept / 2**30 == pytest.approx(1.71, abs=0.005)
    assert kept < watch.activations / 8 == pytest.approx(gib * 2**30, abs=0.01 * 2**30)


def test_gradients_of_earlier_micro_steps_are_no_activations(monkeypatch):
    config = preset("nano")
    _, one, _ = watched(monkeypatch, config, 4, 64, micro_steps=1)
    model, two, memory = watched(monkeypatch, config, 4, 64)
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters())
    assert two.activations <= one.activations
    assert two.activations + gradients <= two.take_peak()
    assert two.take_peak() == memory.held >= gradients, "nothing since"
