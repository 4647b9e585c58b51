"""`patch`: our operations in a Phi model of transformers (phi-1, phi-1.5, phi-2), and the way back."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

from torch import nn
from transformers.models.phi import modeling_phi

from phi1.arguments import check_flag
from phi1.integrations import merged, phi
from phi1.integrations.attention import NAME, register_attention

TESTED = ("5.23",)  # versions of transformers that the tests pass with
OURS: dict[type, type] = {getattr(modeling_phi, ours.__name__, nn.LayerNorm): ours for ours in (
    phi.PhiRotaryEmbedding, phi.PhiAttention, phi.PhiMLP, phi.LayerNorm, phi.PhiForCausalLM)}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}


def patch(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Give a Phi model of transformers our operations, in place.

    The model keeps its modules, parameters, names and state dict. Attention, rotary embedding, layer norms, MLP and
    the training loss are computed by `phi1.kernels`. In training with labels the output has a loss and no logits.

    Args:
        model: PhiForCausalLM or PhiModel (phi-1, phi-1.5, phi-2), or a model that holds one, such as peft's.
        merge: True also merges each layer's projections into two, `in_proj` and `out_proj`. These are then the model's
            parameters; its state dict keeps Hugging Face's names. Adapters on single projections need False.

    Returns:
        The same model. `unpatch` undoes it.

    Raises:
        TypeError: model is no module, or merge no flag.
        ValueError: there is no Phi model inside, it is patched already, its configuration needs what our operations
            lack, or this version of transformers has not been tested.
    """
    check_flag("phi1.patch", merge=merge)
    _check_version()
    found = _phi_models(model, "patch")
    if any(type(module) in THEIRS for module in model.modules()):
        raise ValueError("phi1.patch: the model is patched already")
    for each in found:
        _check_config(each.config)
    if merge:
        for each in found:
            for layer in each.layers:
                merged.merge(layer)
    _swap(found, model)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Give a model its own operations back, in place, and return it.

    Raises:
        ValueError: the model is not patched.
    """
    found = _phi_models(model, "unpatch")
    if not any(type(module) in THEIRS for module in model.modules()):
        raise ValueError("phi1.unpatch: the model is not patched")
    for each in found:
        for layer in each.layers:
            if isinstance(layer, merged.PhiDecoderLayer):
                merged.split(layer)
    for module in model.modules():
        module.__class__ = THEIRS.get(type(module), type(module))
    for each in found:
        each.set_attn_implementation(vars(each).pop("_attention_before_phi1"))
    return model


def patch_transformers() -> None:
    """Patch every Phi model that transformers builds from now on.

    Raises:
        ValueError: it is done already, or this version of transformers has not been tested. Models whose
            configuration needs what our operations lack raise when they are built.
    """
    _check_version()
    original = modeling_phi.PhiPreTrainedModel.post_init
    if hasattr(original, "__wrapped__"):
        raise ValueError("phi1.patch_transformers: transformers is patched already")

    @functools.wraps(original)
    def post_init(self: Any) -> None:
        original(self)
        _check_config(self.config)
        if isinstance(self, modeling_phi.PhiModel):
            _swap([self], self)
        elif type(self) in OURS:
            self.__class__ = OURS[type(self)]

    modeling_phi.PhiPreTrainedModel.post_init = post_init  # type: ignore[method-assign]


def unpatch_transformers() -> None:
    """Let transformers build its own Phi models again. Models that exist stay as they are.

    Raises:
        ValueError: transformers is not patched.
    """
    if "post_init" not in vars(modeling_phi.PhiPreTrainedModel):
        raise ValueError("phi1.unpatch_transformers: transformers is not patched")
    del modeling_phi.PhiPreTrainedModel.post_init


def _phi_models(model: nn.Module, function: str) -> list[modeling_phi.PhiModel]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"phi1.{function}: model must be a model of transformers; got {type(model).__name__}")
    found = [module for module in model.modules() if isinstance(module, modeling_phi.PhiModel)]
    if not found:
        raise ValueError(f"phi1.{function}: model must be a Phi model of transformers (phi-1, phi-1.5, phi-2); "
                         f"got {type(model).__name__}")
    return found


def _swap(found: list[modeling_phi.PhiModel], model: nn.Module) -> None:
    register_attention()
    for each in found:
        vars(each)["_attention_before_phi1"] = each.config._attn_implementation
        for module in each.modules():
            if module is not each:
                module.__class__ = OURS.get(type(module), type(module))
        each.set_attn_implementation(NAME)
    for module in model.modules():
        if type(module) is modeling_phi.PhiForCausalLM:
            module.__class__ = phi.PhiForCausalLM


def _check_config(config: Any) -> None:
    rope = config.rope_parameters["rope_type"]
    for name, value, needed in (("hidden_act", config.hidden_act, "gelu_new"), ("rope_type", rope, "default"),
                                ("qk_layernorm", config.qk_layernorm, False)):
        if value != needed:
            raise ValueError(f"phi1.patch: the model's {name} must be {needed!r}; got {value!r}")


def _check_version() -> None:
    installed = version("transformers")
    if not installed.startswith(tuple(f"{known}." for known in TESTED)):
        raise ValueError(f"phi1.patch: tested with transformers {', '.join(TESTED)}; got {installed}")
