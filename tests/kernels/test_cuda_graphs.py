"""A training step as a CUDA graph: captured once, replayed with other steps' dropout. Skipped without a GPU."""

import pytest
import torch

from phi1.config import preset
from phi1.model import Phi1

if not torch.cuda.is_available():
    pytest.skip("no GPU to capture a graph on", allow_module_level=True)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_captured_step_replays_with_a_new_step_counter(recompute):
    torch.manual_seed(0)
    config = preset("nano", vocab_size=512, num_hidden_layers=2, attention_dropout=0.1, residual_dropout=0.1)
    model = Phi1(config, device="cuda", dtype=torch.float16)
    model.recompute = recompute
    ids = torch.randint(512, (2, 129), device="cuda")
    rng, samples = torch.tensor([3, 0], device="cuda"), torch.tensor([7, 9], device="cuda")

    def step():
        model.zero_grad(set_to_none=True)
        loss = model.loss(ids[:, :-1], ids[:, 1:], rng=rng, sample_ids=samples)
        loss.backward()
        return loss

    def results(loss):
        return [loss.detach().clone(), *(x.grad.clone() for x in model.parameters())]

    expected = []
    for counter in (4, 5):
        rng[1] = counter
        expected.append(results(step()))
    assert not torch.equal(expected[0][0], expected[1][0])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # what is set up at a first call is not captured
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for counter, wanted in zip((4, 5), expected, strict=True):
        rng[1] = counter
        graph.replay()
        assert all(torch.equal(got, want) for got, want in zip(results(loss), wanted, strict=True))
