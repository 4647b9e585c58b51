"""Names and layouts of the published phi checkpoints, and the part of a `phi1.model.Phi1` that each tensor fills.

    A  mixformer-sequential    layers.N.mixer.Wqkv, N from 1; embedding layers.0, final norm and head the last layer;
                               the oldest files say mlp.fc_in and mlp.fc_out
    B  phi-msft                transformer.h.N.mixer.Wqkv, lm_head.ln, lm_head.linear
    C  transformers 4.36       model.layers.N.self_attn.query_key_value, rows interleaved per head: q k v of head 0, ...
    D  transformers >= 4.37    model.layers.N.self_attn.q_proj, k_proj, v_proj; the one that is written

A published tensor fills a rectangle of one of our parameters, so one table of slices serves reading and writing.
D width, F MLP width, H heads, K head size, V vocabulary, R rotary dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from phi1.arguments import listed
from phi1.config import Phi1Config


@dataclass(frozen=True)
class Layout:
    """Module names of one generation of checkpoints; {n} is the number of a block, {end} the number after the last."""

    embed: str
    block: str
    norm: str
    qkv: tuple[str, ...]  # one fused module, or q, k and v
    dense: str
    fc1: str
    fc2: str
    final_norm: str
    head: str
    first: int = 0  # number of the first block
    interleaved: bool = False  # rows of the fused module are ordered head by head


_MIXFORMER: dict[str, Any] = {"norm": "ln", "qkv": ("mixer.Wqkv",), "dense": "mixer.out_proj"}
_TRANSFORMERS: dict[str, Any] = {
    "embed": "model.embed_tokens", "block": "model.layers.{n}.", "norm": "input_layernorm", "dense": "self_attn.dense",
    "fc1": "mlp.fc1", "fc2": "mlp.fc2", "final_norm": "model.final_layernorm", "head": "lm_head",
}
_SEQUENTIAL: dict[str, Any] = {
    **_MIXFORMER, "embed": "layers.0.wte", "block": "layers.{n}.", "first": 1,
    "final_norm": "layers.{end}.ln", "head": "layers.{end}.linear",
}
LAYOUTS = {
    "mixformer-sequential": Layout(**_SEQUENTIAL, fc1="mlp.fc1", fc2="mlp.fc2"),
    "mixformer-sequential, fc_in and fc_out": Layout(**_SEQUENTIAL, fc1="mlp.fc_in", fc2="mlp.fc_out"),
    "phi-msft": Layout(**_MIXFORMER, embed="transformer.embd.wte", block="transformer.h.{n}.", fc1="mlp.fc1",
                       fc2="mlp.fc2", final_norm="lm_head.ln", head="lm_head.linear"),
    "transformers 4.36": Layout(**_TRANSFORMERS, qkv=("self_attn.query_key_value",), interleaved=True),
    "transformers": Layout(**_TRANSFORMERS, qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
}
WRITTEN = "transformers"


@dataclass(frozen=True)
class ParameterSlice:
    """The rectangle of one of our parameters that a published tensor fills."""

    parameter: str
    index: tuple[slice | int, ...]
    shape: tuple[int, ...]  # shape of the published tensor
    heads: int = 0  # H if its rows are interleaved per head, else 0

    def fill(self, parameter: Tensor, tensor: Tensor) -> None:
        """Copy the published tensor into our parameter, cast to its dtype, without another copy."""
        region = parameter[self.index]
        if self.heads:
            region = region.unflatten(0, (3, self.heads, -1))  # [3, H, K, ...]
            tensor = tensor.unflatten(0, (self.heads, 3, -1)).transpose(0, 1)
        region.copy_(tensor)


def parameter_slices(layout: Layout, config: Phi1Config) -> dict[str, ParameterSlice]:
    """Return the slice that each published name of the layout fills."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    heads = config.num_attention_heads if layout.interleaved else 0
    whole = slice(None)
    table = {f"{layout.embed}.weight": ParameterSlice("embed.weight", (whole,), (v, d))}

    def rows(name: str, module: str, first: int, count: int, interleaved_heads: int = 0) -> None:
        index = (slice(first, first + count),)
        table[f"{name}.weight"] = ParameterSlice(f"{module}.weight", index, (count, d), interleaved_heads)
        table[f"{name}.bias"] = ParameterSlice(f"{module}.bias", index, (count,), interleaved_heads)

    def columns(name: str, module: str, branch: int, first: int, count: int) -> None:
        table[f"{name}.weight"] = ParameterSlice(f"{module}.weight", (whole, slice(first, first + count)), (d, count))
        table[f"{name}.bias"] = ParameterSlice(f"{module}.bias", (branch,), (d,))

    def norm(name: str, module: str) -> None:
        for leaf in ("weight", "bias"):
            table[f"{name}.{leaf}"] = ParameterSlice(f"{module}.{leaf}", (whole,), (d,))

    for layer in range(config.num_hidden_layers):
        theirs, ours = layout.block.format(n=layer + layout.first), f"blocks.{layer}."
        norm(theirs + layout.norm, ours + "norm")
        share = 3 * d // len(layout.qkv)
        for i, name in enumerate(layout.qkv):
            rows(theirs + name, ours + "in_proj", i * share, share, heads)
        rows(theirs + layout.fc1, ours + "in_proj", 3 * d, f)
        columns(theirs + layout.dense, ours + "out_proj", 0, 0, d)
        columns(theirs + layout.fc2, ours + "out_proj", 1, d, f)
    end = config.num_hidden_layers + layout.first
    norm(layout.final_norm.format(end=end), "norm")
    rows(layout.head.format(end=end), "head", 0, v)
    return table


def recognise(names: Iterable[str], config: Phi1Config) -> dict[str, ParameterSlice] | None:
    """Return the slices of the layout that has most of the names, or None if no layout has one."""
    present = set(names)
    tables = [parameter_slices(layout, config) for layout in reversed(LAYOUTS.values())]  # of equals, the current one
    best = max(tables, key=lambda table: len(present & table.keys()))
    return best if present & best.keys() else None


def misfits(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return one entry each for missing, unexpected and misshapen tensors, with their names."""
    lists = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "misshapen": [f"{name} {list(found[name])}, which must be {list(shape)}" for name, shape in expected.items()
                      if name in found and found[name] != shape],
    }
    return [f"{kind}: {listed(names)}" for kind, names in lists.items() if names]


def is_derived(name: str) -> bool:
    """Return True for rotary frequencies, which old files hold; they follow from the configuration and are not read."""
    return name.endswith("rotary_emb.inv_freq")


_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of one function
_OLD_TYPES = ("mixformer-sequential", "phi-msft")


def read_config(raw: dict[str, Any]) -> Phi1Config:
    """Return the Phi1Config of a published config.json of any age.

    Raises:
        ValueError: another architecture, a missing key, or a value that breaks a rule.
        NotImplementedError: a variant that was never published as phi-1, such as grouped-query attention.
    """
    kind = raw.get("model_type")
    if kind != "phi" and kind not in _OLD_TYPES:
        raise ValueError(f"model_type must be one of phi, {', '.join(_OLD_TYPES)}; got {kind!r}")
    return _read_old(raw) if kind in _OLD_TYPES else _read_transformers(raw)


def _require(raw: dict[str, Any], keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if raw.get(key) is None]
    if missing:
        raise ValueError(f"the keys {', '.join(missing)} are missing")
    wrong = [key for key in keys if not isinstance(raw[key], int) or raw[key] < 1]
    if wrong:
        raise ValueError(f"{wrong[0]} must be a whole number, 1 or more; got {raw[wrong[0]]!r}")


def _refuse(unsupported: dict[str, bool]) -> None:
    found = [what for what, present in unsupported.items() if present]
    if found:
        raise NotImplementedError(f"not supported: {', '.join(found)}")


def _rope(raw: dict[str, Any], key: str) -> dict[str, Any]:
    settings = {} if raw.get(key) is None else raw[key]
    if not isinstance(settings, dict):
        raise ValueError(f"{key} must be an object such as {{\"rope_type\": \"default\"}}; got {settings!r}")
    return settings


def _is_plain(rope: dict[str, Any]) -> bool:
    """True if the settings scale nothing. Their type has two spellings; settings by type of layer are not plain."""
    kinds = {rope.get(key) or "default" for key in ("rope_type", "type")}
    return kinds == {"default"} and not any(isinstance(value, dict) for value in rope.values())


def _read_transformers(raw: dict[str, Any]) -> Phi1Config:
    _require(raw, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))
    rope, scaling = (_rope(raw, key) for key in ("rope_parameters", "rope_scaling"))
    heads = raw["num_attention_heads"]
    _refuse({
        f"num_key_value_heads {raw.get('num_key_value_heads')} (must be num_attention_heads)":
            raw.get("num_key_value_heads") not in (None, heads),
        f"hidden_act {raw.get('hidden_act')} (must be gelu_new)": raw.get("hidden_act", "gelu_new") not in _TANH_GELU,
        f"rope_parameters {rope}": not _is_plain(rope),
        f"rope_scaling {scaling}": not _is_plain(scaling),
        "qk_layernorm": bool(raw.get("qk_layernorm")),
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings")),
        f"embd_pdrop {raw.get('embd_pdrop')} (must be 0)": bool(raw.get("embd_pdrop")),
    })
    factor = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 0.5))
    return Phi1Config(
        vocab_size=raw["vocab_size"], hidden_size=raw["hidden_size"], intermediate_size=raw["intermediate_size"],
        num_hidden_layers=raw["num_hidden_layers"], num_attention_heads=heads,
        rotary_dim=int(raw["hidden_size"] // heads * factor),
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        layer_norm_eps=raw.get("layer_norm_eps", 1e-5), initializer_range=raw.get("initializer_range", 0.02),
        attention_dropout=raw.get("attention_dropout") or 0.0, residual_dropout=raw.get("resid_pdrop") or 0.0,
    )


def _read_old(raw: dict[str, Any]) -> Phi1Config:
    _require(raw, ("vocab_size", "n_embd", "n_layer", "n_head"))
    width, heads = raw["n_embd"], raw["n_head"]
    _refuse({
        f"n_head_kv {raw.get('n_head_kv')} (must be n_head)": raw.get("n_head_kv") not in (None, heads),
        f"activation_function {raw.get('activation_function')} (must be gelu_new)":
            raw.get("activation_function", "gelu_new") not in _TANH_GELU,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings")),
        f"embd_pdrop {raw.get('embd_pdrop')} (must be 0)": bool(raw.get("embd_pdrop")),
    })
    return Phi1Config(
        vocab_size=raw["vocab_size"], hidden_size=width, intermediate_size=raw.get("n_inner") or 4 * width,
        num_hidden_layers=raw["n_layer"], num_attention_heads=heads,
        # The old code took the smaller of the two too.
        rotary_dim=min(raw.get("rotary_dim", 32), width // heads),
        max_position_embeddings=raw.get("n_positions", 2048), layer_norm_eps=raw.get("layer_norm_epsilon", 1e-5),
        initializer_range=raw.get("initializer_range", 0.02),
        attention_dropout=raw.get("attn_pdrop") or 0.0, residual_dropout=raw.get("resid_pdrop") or 0.0,
    )


def written_config(config: Phi1Config, eos_id: int | None, dtype: str) -> dict[str, Any]:
    """Return config.json in the current layout, with the keys of older transformers versions too.

    Args:
        config: the model's configuration.
        eos_id: id of <|endoftext|>, which also begins a text; None if it is not known.
        dtype: name of the tensors' dtype, such as "float16".
    """
    factor = config.rotary_dim / config.head_dim
    if int(config.head_dim * factor) < config.rotary_dim:  # transformers truncates
        factor = math.nextafter(factor, 1.0)
    return {
        "architectures": ["PhiForCausalLM"], "model_type": "phi",
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings, "hidden_act": "gelu_new",
        "layer_norm_eps": config.layer_norm_eps, "initializer_range": config.initializer_range,
        "attention_dropout": config.attention_dropout, "resid_pdrop": config.residual_dropout, "embd_pdrop": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": factor},
        "rope_theta": config.rope_theta, "partial_rotary_factor": factor, "rope_scaling": None,
        "qk_layernorm": False, "tie_word_embeddings": False, "use_cache": True,
        # Explicit, because PhiConfig's defaults of 1 and 2 are '"' and '#' in phi-1's vocabulary.
        "bos_token_id": eos_id, "eos_token_id": eos_id, "pad_token_id": None,
        "dtype": dtype, "torch_dtype": dtype,
    }
