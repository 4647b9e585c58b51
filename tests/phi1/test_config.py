"""Model configuration: the published sizes and one clear error for each broken rule."""

import dataclasses

import pytest
import torch

from phi1 import PRESETS, Phi1, Phi1Config, preset


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Counted from the tensors of transformers' PhiForCausalLM at these shapes.
    [("phi1", 1_418_270_720), ("phi1-small", 356_794_368), ("phi1.5", 1_418_270_720), ("phi2", 2_779_683_840)],
)
def test_published_sizes(name, parameters):
    config = PRESETS[name]
    assert config.num_parameters == parameters
    assert sum(p.numel() for p in Phi1(config, device="meta").parameters()) == parameters


def test_presets_are_frozen_and_copied_with_changes():
    assert (PRESETS["phi1"].head_dim, PRESETS["phi2"].head_dim) == (64, 80)
    assert PRESETS["nano"].num_parameters < 6e6
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["phi1"].hidden_size = 1
    config = preset("nano", vocab_size=300, attention_dropout=0.1)
    assert (config.vocab_size, config.attention_dropout, config.hidden_size) == (300, 0.1, 256)
    assert PRESETS["nano"].vocab_size == 4096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number, 1 or more; got 0"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers must be a whole number, 1 or more; got 1.5"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        ({"hidden_size": 2049}, r"hidden_size must be a multiple of num_attention_heads \(32\); got 2049"),
        ({"rotary_dim": 31}, r"rotary_dim must be even and between 2 and the head size \(64\); got 31"),
        ({"rotary_dim": 66}, "rotary_dim must be even"),
        ({"rope_theta": 0.0}, "rope_theta must be greater than 0; got 0.0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be finite; got nan"),
        ({"initializer_range": "0.02"}, "initializer_range must be a number"),
        ({"attention_dropout": 1.0}, "attention_dropout must be at least 0 and less than 1; got 1.0"),
        ({"residual_dropout": -0.1}, "residual_dropout must be at least 0 and less than 1; got -0.1"),
    ],
)
def test_errors_name_field_rule_and_value(changes, message):
    with pytest.raises(ValueError, match=message):
        Phi1Config(**changes)


def test_unknown_preset_and_field():
    with pytest.raises(ValueError, match=r"name must be one of phi1, .*nano; got 'phi3'"):
        preset("phi3")
    with pytest.raises(ValueError, match="'n_layer' is not a field"):
        preset("nano", n_layer=2)


def test_initial_weights():
    model = Phi1(preset("nano", vocab_size=512))
    model.init_weights(seed=1)
    first = {name: p.clone() for name, p in model.named_parameters()}
    for name, p in first.items():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
    model.init_weights(seed=2)
    assert not torch.equal(model.embed.weight, first["embed.weight"])
    model.init_weights(seed=1)
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters())


def test_a_size_that_no_model_has_is_refused():
    with pytest.raises(ValueError, match="max_position_embeddings must be at most 1,048,576; got 1000000000000"):
        Phi1Config(max_position_embeddings=10**12)
