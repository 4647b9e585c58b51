"""Attention "phi1" for the models of transformers: causal or not, left-padded or packed, with a growing cache.

transformers calls two functions. `attention_mask` runs once a forward and says which keys a query may see, in the
form that the operation takes; `attention_forward` runs in each layer.

B batch, H heads, G key heads, T tokens, K head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from phi1.kernels import Dropout, attention

NAME = "phi1"


def register_attention() -> None:
    """Make `attn_implementation="phi1"` known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def attention_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
                   mask_function: Callable = causal_mask_function, attention_mask: Tensor | None = None,
                   device: torch.device | str = "cpu", **_: Any) -> Tensor | None:
    """Return what limits the keys besides causality.

    It is None, seq_starts int32 [B] for left padding, or cu_seqlens int32 [1, documents + 1] for packed documents.

    Args:
        batch_size, q_length, kv_length: B, and the numbers of queries and keys.
        q_offset, kv_offset: the positions of the first query and the first key.
        mask_function: transformers' rule of which key a query sees.
        attention_mask: bool [B, tokens so far], False on padding.

    Raises:
        ValueError: the rule is none that the operation computes.
    """
    if isinstance(q_offset, Tensor) or kv_offset or q_offset + q_length != kv_length:
        raise ValueError("attention 'phi1' needs a cache that grows (DynamicCache), whose keys end at the newest "
                         "token; this cache is static, sliding or of another kind")
    plain = mask_function in (causal_mask_function, bidirectional_mask_function)
    if attention_mask is not None:
        if not plain:
            raise ValueError("attention 'phi1' takes padding or packed documents, not both")
        return _starts(attention_mask, causal=mask_function is causal_mask_function)
    return None if plain else _documents(batch_size, q_length, mask_function, device)


def attention_forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                      scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
                      **kwargs: Any) -> tuple[Tensor, None]:
    """Return attention's output [B, T, H, K] and no probabilities.

    Args:
        module: the layer; `is_causal` and `training` count.
        query: [B, H, T, K].
        key, value: [B, G, Tk, K]. With G < H each is repeated for H / G heads, in a copy.
        attention_mask: what `attention_mask` has returned.
        scaling: factor of the scores; 1 / sqrt(K) by default.
        dropout: probability; its masks are drawn from PyTorch's generator.

    Raises:
        ValueError: a mask of another form, or a feature that the operation lacks.
    """
    for feature in ("softcap", "sliding_window", "s_aux", "position_bias"):
        if kwargs.get(feature) is not None:
            raise ValueError(f"attention 'phi1' has no {feature}; choose attn_implementation=\"sdpa\" for this model")
    if attention_mask is not None and attention_mask.dim() > 2:
        raise ValueError("attention 'phi1' takes a padding mask [B, T], not a mask of "
                         f"{attention_mask.dim()} dimensions; choose attn_implementation=\"sdpa\" for it")
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    (dropped,) = draw_dropouts((dropout,), query.device)
    limits = Limits.of(attention_mask)
    return attention(q, k, v, causal=causal, scale=scaling, dropout=dropped, cu_seqlens=limits.cu_seqlens,
                     seq_starts=limits.seq_starts), None


class Limits(NamedTuple):
    """A mask in the form that the operations take: at most one of the two is a tensor."""

    cu_seqlens: Tensor | None
    seq_starts: Tensor | None

    @classmethod
    def of(cls, mask: Tensor | None) -> Limits:
        """Read what `attention_mask` has returned."""
        packed = mask is not None and mask.dim() == 2
        return cls(mask[0], None) if mask is not None and packed else cls(None, mask)


def draw_dropouts(rates: Sequence[float], device: torch.device) -> tuple[Dropout | None, ...]:
    """Return dropouts whose masks follow PyTorch's generator, so that a recomputed forward has the same ones."""
    if not any(rates):
        return (None,) * len(rates)
    rng = torch.randint(2**32, (2,), device=device)
    return tuple(Dropout(p, rng, kind=kind) if p else None for kind, p in enumerate(rates))


def _starts(mask: Tensor, *, causal: bool) -> Tensor | None:
    """Return the first real token of each row. Padding behind the last one is seen by no real token if causal."""
    starts = mask.logical_not().cumprod(1, dtype=torch.int32).sum(1, dtype=torch.int32)
    if torch.compiler.is_compiling():
        return starts
    if bool(mask.all()):
        return None
    left = torch.arange(mask.shape[1], device=mask.device) >= starts[:, None]
    ends = mask.flip(1).logical_not().cumprod(1, dtype=torch.int32).sum(1)  # padding on the right
    real = left & (torch.arange(mask.shape[1], 0, -1, device=mask.device) > ends[:, None])
    if bool((mask != (real if causal else left)).any()):
        raise ValueError("attention 'phi1' takes padding before the tokens of a row" +
                         (" or behind them, not between them" if causal else " alone in a model that is not causal"))
    return starts


def _documents(batch: int, tokens: int, sees: Callable, device: torch.device | str) -> Tensor:
    """Return where documents begin in the rows of a batch, one after another: int32 [1, documents + 1]."""
    rows, row = torch.arange(batch, device=device), torch.arange(tokens, device=device)
    begins = ~sees(rows[:, None], torch.zeros_like(rows)[:, None], row[None], (row - 1).clamp(min=0)[None])
    begins = begins.expand(batch, tokens).clone()
    begins[:, 0] = True
    if not torch.compiler.is_compiling():
        document = begins.cumsum(1)
        expected = (document[:, :, None] == document[:, None]) & (row[:, None] >= row)
        given = sdpa_mask(batch_size=batch, q_length=tokens, kv_length=tokens, mask_function=sees, device=device,
                          allow_is_causal_skip=False)
        if given is None or not torch.equal(given.expand(batch, 1, tokens, tokens)[:, 0], expected):
            raise ValueError("attention 'phi1' computes causal attention over whole rows or packed documents; this "
                             "model asks for another pattern")
    n = batch * tokens
    first = torch.where(begins.flatten(), torch.arange(n, device=device), n).sort().values
    if not torch.compiler.is_compiling():  # a compiled model keeps one size: empty documents follow
        first = first[: int(begins.sum())]
    return torch.cat((first, first.new_full((1,), n))).to(torch.int32)[None]
