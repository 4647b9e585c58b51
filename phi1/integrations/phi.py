"""transformers' Phi with our operations: the same modules, parameters and state dict, other forwards.

Each class here replaces transformers' class of the same name, whose instances take it as their `__class__`.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.phi import modeling_phi
from transformers.utils.generic import can_return_tuple

from phi1.kernels import gelu, layer_norm, linear_cross_entropy, mlp, rotary


class PhiRotaryEmbedding(modeling_phi.PhiRotaryEmbedding):
    """Float32 tables of the positions of a batch, and each token's row in them."""

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return cos and sin [B T, R/2] (or [T, R/2] if all rows have the same positions) and rows int64 [B T]."""
        angles = (position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float32)).flatten(0, 1)
        rows = torch.arange(len(angles), device=x.device).expand(x.shape[0] // position_ids.shape[0], -1).flatten()
        return angles.cos(), angles.sin(), rows


class PhiAttention(modeling_phi.PhiAttention):
    """Attention with one rotation of q and one of k, in place of cuts, products and concatenations."""

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, ...], attention_mask: Tensor | None,
                past_key_values: Any = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, T, D] and the probabilities, if the chosen implementation has them."""
        batch, tokens, _ = hidden_states.shape
        q, k, v = (project(hidden_states).unflatten(2, (-1, self.head_dim))
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotary(x.flatten(0, 1)[:, None], *position_embeddings).view_as(x) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, K]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = modeling_phi.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation,
                                                                    modeling_phi.eager_attention_forward)
        out, probabilities = attend(self, q, k, v, attention_mask, scaling=self.scaling,
                                    dropout=self.attention_dropout if self.training else 0.0, **kwargs)
        return self.dense(out.reshape(batch, tokens, -1)), probabilities


class PhiMLP(modeling_phi.PhiMLP):
    """fc1, gelu_new and fc2 as one operation, or gelu_new alone where another library has wrapped a projection."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return [B, T, D]."""
        if not (is_plain(self.fc1) and is_plain(self.fc2)):
            return self.fc2(gelu(self.fc1(hidden_states)))
        x, *parameters = in_autocast(hidden_states.flatten(0, -2), self.fc1.weight, self.fc1.bias, self.fc2.weight,
                                     self.fc2.bias)
        return mlp(x, *parameters).unflatten(0, hidden_states.shape[:-1])


class LayerNorm(nn.LayerNorm):
    """PyTorch's layer norm by our operation."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input, in the weight's dtype under autocast."""
        x = input.to(self.weight.dtype) if torch.is_autocast_enabled(input.device.type) else input
        return layer_norm(x.flatten(0, -2), self.weight, self.bias, self.eps).view_as(x)


class PhiForCausalLM(modeling_phi.PhiForCausalLM):
    """The model whose loss in training needs no logits."""

    @functools.wraps(modeling_phi.PhiForCausalLM.forward)  # Trainer reads the signature
    def forward(  # type: ignore[override]
            self, *args: Any, labels: Tensor | None = None, logits_to_keep: int | Tensor = 0, **kwargs: Any):
        whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
        ours = self.training and whole and is_plain(self.lm_head) and \
            self.loss_function is LOSS_MAPPING["ForCausalLM"]
        if labels is None or not ours:
            return super().forward(*args, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        return self._forward_without_logits(*args, labels=labels, **kwargs)

    @can_return_tuple
    def _forward_without_logits(self, *args: Any, labels: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        if kwargs.get("use_cache") is None and kwargs.get("past_key_values") is None:
            kwargs["use_cache"] = False  # the configuration's True is meant for generation
        outputs = self.model(*args, **kwargs)
        targets = kwargs.get("shift_labels")
        if targets is None:
            targets = F.pad(labels, (0, 1), value=-100)[..., 1:]
        items = kwargs.get("num_items_in_batch")
        h, weight, bias = in_autocast(outputs.last_hidden_state.flatten(0, 1), self.lm_head.weight, self.lm_head.bias)
        loss = cast(Tensor, linear_cross_entropy(h, weight, bias, targets.to(h.device).flatten(),
                                                 reduction="mean" if items is None else "sum"))
        if items is not None:
            loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        return CausalLMOutputWithPast(loss=loss, past_key_values=outputs.past_key_values,
                                      hidden_states=outputs.hidden_states, attentions=outputs.attentions)


def is_plain(module: nn.Module) -> bool:
    """Tell whether a projection is nn.Linear as it is, with no adapter, quantisation or hook around it."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is nn.Linear and not hooked


def in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast to autocast's dtype where it is on, as PyTorch does for the inputs of its own matrix products."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
