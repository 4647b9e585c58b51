"""A tiny model whose parameters are all random, and the comparison of two models."""

from __future__ import annotations

import torch

from phi1 import Phi1, Phi1Config

TINY = Phi1Config(vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                  rotary_dim=4, max_position_embeddings=64, layer_norm_eps=1e-5)


def tiny_model(seed: int = 0) -> Phi1:
    """A model of TINY. Every parameter is random, biases and norms too: zeros and ones would hide a wrong place."""
    model = Phi1(TINY)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=generator)
    return model.eval()


def assert_same(model: Phi1, other: Phi1) -> None:
    """Assert that two models have the same parameters and tables, bit for bit."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert torch.equal(model.rotary_tables, other.rotary_tables)
