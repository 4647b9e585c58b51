"""transformers' Phi layer in two matrix products, with the state dict still in Hugging Face's layout.

    in_proj.weight   [3D + F, D]   rows of q_proj, k_proj, v_proj, fc1      in_proj.bias   [3D + F]
    out_proj.weight  [D, D + F]    columns of dense, fc2                    out_proj.bias  [2, D]   rows of dense, fc2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.models.phi import modeling_phi

from phi1.integrations.attention import Limits, draw_dropouts
from phi1.integrations.phi import in_autocast
from phi1.kernels import attention, gelu, layer_norm, linear, parallel_block, rotary

IN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
OUT = ("self_attn.dense", "mlp.fc2")
ORDER = (*IN[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")  # of a state dict


class Projection(nn.Module):
    """A merged weight and bias."""

    def __init__(self, weight: Tensor, bias: Tensor, trained: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trained)
        self.bias = nn.Parameter(bias, requires_grad=trained)


class PhiDecoderLayer(modeling_phi.PhiDecoderLayer):
    """The layer as one parallel block: x + drop(attention(h)) + drop(mlp(h)), h = layer_norm(x)."""

    in_proj: Projection
    out_proj: Projection
    input_layernorm: nn.LayerNorm
    resid_dropout: nn.Dropout
    n_heads: int
    layer_idx: int
    attention_dropout: float
    config: Any
    hooks: tuple[Any, Any]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
                past_key_values: Any = None, use_cache: bool | None = False,
                position_embeddings: tuple[Tensor, ...] | None = None, **kwargs: Any) -> Tensor:
        """Return x' [B, T, D]."""
        assert position_embeddings is not None
        batch, tokens, _ = hidden_states.shape
        norm, d = self.input_layernorm, hidden_states.shape[2]
        x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias = in_autocast(
            hidden_states.flatten(0, 1), norm.weight, norm.bias, self.in_proj.weight, self.in_proj.bias,
            self.out_proj.weight, self.out_proj.bias)
        cos, sin, rows = position_embeddings
        limits = Limits.of(attention_mask)
        p_attention, p_out = (self.attention_dropout, self.resid_dropout.p) if self.training else (0.0, 0.0)
        if past_key_values is None:
            drop_attention, drop_dense, drop_fc2 = draw_dropouts((p_attention, p_out, p_out), x.device)
            out = parallel_block(x, norm_weight, norm_bias, in_weight, in_bias, out_weight, out_bias, cos, sin,
                                 n_heads=self.n_heads, batch=batch if limits.cu_seqlens is None else None,
                                 cu_seqlens=limits.cu_seqlens, seq_starts=limits.seq_starts, positions=rows,
                                 eps=norm.eps, dropouts=(drop_attention, drop_dense, drop_fc2))
            return out.view_as(hidden_states)
        if p_attention or p_out:
            raise ValueError("phi1.patch: a merged layer drops out without a cache alone; pass use_cache=False in "
                             "training")
        merged = linear(layer_norm(x, norm_weight, norm_bias, norm.eps), in_weight, in_bias)  # [N, 3D + F]
        qkv = rotary(merged[:, : 3 * d].unflatten(1, (3, self.n_heads, -1)), cos, sin, rows)
        q, k, v = qkv.unflatten(0, (batch, tokens)).permute(2, 0, 3, 1, 4)  # [B, H, T, K] each
        k, v = past_key_values.update(k, v, self.layer_idx)
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seq_starts=limits.seq_starts)
        both = torch.cat((out.flatten(0, 1).flatten(1), gelu(merged[:, 3 * d :])), dim=1)  # [N, D + F]
        return linear(both, out_weight, out_bias.sum(0), residual=x).view_as(hidden_states)


@torch.no_grad()
def merge(layer: Any) -> None:
    """Turn a layer's six projections into two, in place. At no time are there two copies of more than one layer.

    Raises:
        ValueError: a projection is wrapped (by an adapter, say), or some projections are trained and some not.
    """
    parts = [layer.get_submodule(name) for name in (*IN, *OUT)]
    trained = {p.requires_grad for part in parts for p in part.parameters()}
    if len(trained) != 1 or any(type(part) is not nn.Linear for part in parts):
        raise ValueError("phi1.patch: merge=True needs plain projections that are all trained or all frozen; merge "
                         "before adapters are added")
    ins, outs = parts[: len(IN)], parts[len(IN) :]
    attention_module = layer.self_attn
    layer.n_heads = attention_module.config.num_attention_heads
    layer.layer_idx, layer.attention_dropout = attention_module.layer_idx, attention_module.attention_dropout
    layer.config = attention_module.config
    layer.in_proj = Projection(torch.cat([part.weight for part in ins]), torch.cat([part.bias for part in ins]),
                               *trained)
    layer.out_proj = Projection(torch.cat([part.weight for part in outs], 1), torch.stack([p.bias for p in outs]),
                                *trained)
    del layer.self_attn, layer.mlp
    layer.__class__ = PhiDecoderLayer
    layer.hooks = (layer.register_state_dict_post_hook(_split_in_state_dict),
                   layer.register_load_state_dict_pre_hook(_merge_in_state_dict))


@torch.no_grad()
def split(layer: PhiDecoderLayer) -> None:
    """Undo `merge`."""
    trained = layer.in_proj.weight.requires_grad
    tensors = {name: tensor.clone() for name, tensor in _split(layer).items()}
    for hook in layer.hooks:
        hook.remove()
    with torch.device("meta"):
        layer.self_attn = modeling_phi.PhiAttention(layer.config, layer.layer_idx)
        layer.mlp = modeling_phi.PhiMLP(layer.config)
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        setattr(layer.get_submodule(module), parameter, nn.Parameter(tensor, requires_grad=trained))
    layer.train(layer.training)
    for name in ("input_layernorm", "resid_dropout"):  # behind the others, as transformers has them
        layer._modules[name] = layer._modules.pop(name)
    del layer.in_proj, layer.out_proj, layer.hooks, layer.n_heads, layer.layer_idx, layer.attention_dropout
    del layer.config
    layer.__class__ = modeling_phi.PhiDecoderLayer  # type: ignore[assignment]


def _split(layer: PhiDecoderLayer) -> dict[str, Tensor]:
    """Return the parameters by Hugging Face's names: views of in_proj, and copies of out_proj's columns."""
    d = layer.in_proj.weight.shape[1]
    rows = [d, d, d, layer.in_proj.weight.shape[0] - 3 * d]
    (in_weight, in_bias), (out_weight, out_bias) = ((_whole(part.weight), _whole(part.bias))
                                                    for part in (layer.in_proj, layer.out_proj))
    weights = dict(zip((*IN, *OUT), (*in_weight.split(rows), *out_weight.split([d, rows[3]], 1)), strict=True))
    biases = dict(zip((*IN, *OUT), (*in_bias.split(rows), *out_bias), strict=True))
    return {f"{name}.{kind}": values[name].contiguous()
            for name in ORDER for kind, values in (("weight", weights), ("bias", biases))}


def _whole(parameter: Tensor) -> Tensor:
    """Gather a parameter that FSDP2 has sharded."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _split_in_state_dict(layer: PhiDecoderLayer, state: dict, prefix: str, _: Any) -> None:
    own = {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
    detached = not own["in_proj.weight"].requires_grad  # as state_dict() gives them without keep_vars
    state |= {prefix + name: tensor.detach() if detached else tensor for name, tensor in _split(layer).items()}
    state |= {prefix + name: tensor for name, tensor in own.items() if name.startswith("input_layernorm.")}


def _merge_in_state_dict(layer: PhiDecoderLayer, state: dict, prefix: str, *_: Any) -> None:
    if not all(f"{prefix}{name}.{kind}" in state for name in (*IN, *OUT) for kind in ("weight", "bias")):
        return  # whose names load_state_dict reports as missing
    ins, outs = ([[state.pop(f"{prefix}{name}.{kind}") for name in names] for kind in ("weight", "bias")]
                 for names in (IN, OUT))
    state[f"{prefix}in_proj.weight"], state[f"{prefix}in_proj.bias"] = map(torch.cat, ins)
    state[f"{prefix}out_proj.weight"] = torch.cat(outs[0], 1)
    state[f"{prefix}out_proj.bias"] = torch.stack(outs[1])

