"""transformers' Phi as a peer: its layer on our parameters, and its whole model with our weights."""

from __future__ import annotations

from typing import Any

import torch

from phi1.bench.harness.case import Case, Function, Inputs
from phi1.config import Phi1Config


def phi_config(config: Phi1Config, dropout: float = 0.0) -> Any:
    """transformers' configuration of the same shape, with SDPA attention."""
    from transformers import PhiConfig

    return PhiConfig(  # type: ignore[call-arg]
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta,
                         "partial_rotary_factor": config.rotary_dim / config.head_dim},
        resid_pdrop=dropout, embd_pdrop=0.0, attention_dropout=dropout, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=None,
    )


def quiet() -> None:
    """Switch off progress bars, which would stand between the lines of the tables."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def decoder_layer(case: Case, batch: int, heads: int, dropout: float) -> Function:
    """PhiDecoderLayer on views of our merged parameters, so that gradients come back in our layout."""
    from transformers.models.phi.modeling_phi import PhiDecoderLayer

    width, inner = case.shape["D"], case.shape["F"]
    config = Phi1Config(hidden_size=width, intermediate_size=inner, num_attention_heads=heads, num_hidden_layers=1,
                        rotary_dim=width // heads // 2)
    with torch.device("meta"):
        layer = PhiDecoderLayer(phi_config(config, dropout), 0).train()

    def run(inputs: Inputs) -> torch.Tensor:
        x = inputs["x"].unflatten(0, (batch, -1))
        cos, sin = (torch.cat((table, table), dim=-1)[None].to(x.dtype) for table in (inputs["cos"], inputs["sin"]))
        out = torch.func.functional_call(layer, layer_parameters(inputs, width), (x,),
                                         {"position_embeddings": (cos, sin)})
        return (out[0] if isinstance(out, tuple) else out).flatten(0, 1)

    return run


def layer_parameters(inputs: Inputs, width: int) -> dict[str, torch.Tensor]:
    """The layer's parameters as views of ours."""
    found = {"input_layernorm.weight": inputs["norm_weight"], "input_layernorm.bias": inputs["norm_bias"],
             "self_attn.dense.weight": inputs["out_weight"][:, :width], "self_attn.dense.bias": inputs["out_bias"][0],
             "mlp.fc2.weight": inputs["out_weight"][:, width:], "mlp.fc2.bias": inputs["out_bias"][1]}
    ends = (0, width, 2 * width, 3 * width, inputs["in_weight"].shape[0])
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
    for name, begin, end in zip(names, ends, ends[1:], strict=False):
        found |= {f"{name}.weight": inputs["in_weight"][begin:end], f"{name}.bias": inputs["in_bias"][begin:end]}
    return found


def causal_model(model: torch.nn.Module, config: Phi1Config, dropout: float = 0.0) -> Any:
    """PhiForCausalLM with the weights of one of ours, on its device and in its dtype."""
    from transformers import PhiForCausalLM

    from phi1.weights.layouts import LAYOUTS, WRITTEN, parameter_slices

    state = model.state_dict()
    with torch.device("meta"):
        theirs: Any = PhiForCausalLM(phi_config(config, dropout))
    device, dtype = state["embed.weight"].device, state["embed.weight"].dtype
    theirs = theirs.to_empty(device=device).to(dtype)
    # Not in the state dict, and left without values by to_empty.
    rotary = theirs.model.rotary_emb
    half = torch.arange(config.rotary_dim // 2, device=device, dtype=torch.float32)
    rotary.inv_freq = config.rope_theta ** (-2 * half / config.rotary_dim)
    slices = parameter_slices(LAYOUTS[WRITTEN], config)
    theirs.load_state_dict({name: state[place.parameter][place.index] for name, place in slices.items()})
    return theirs
