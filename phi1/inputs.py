"""Rules of the model's inputs: token ids, the padding mask, and the room that the context and the cache have."""

from __future__ import annotations

import torch
from torch import Tensor

from phi1.cache import Cache
from phi1.config import Phi1Config


def check_ids(config: Phi1Config, ids: Tensor, cache: Cache | None) -> tuple[int, int]:
    """Return (B, T) of ids [B, T].

    Raises:
        ValueError: ids are not int64 [B, T], lie outside the vocabulary, or do not fit the context or the cache.
    """
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(f"Phi1: ids must be int64 [B, T]; got {ids.dtype} {list(ids.shape)}")
    batch, tokens = ids.shape
    limit = config.max_position_embeddings
    held = 0 if cache is None else cache.length
    if held + tokens > limit:
        raise ValueError(f"Phi1: at most {limit} tokens fit the model's context; got {held + tokens}")
    if cache is not None and held + tokens > cache.max_length:
        raise ValueError(f"Phi1: at most {cache.max_length} tokens fit the cache; got {held + tokens}")
    if cache is not None and cache.kv.shape[2] != batch:
        raise ValueError(f"Phi1: ids must have the cache's batch, {cache.kv.shape[2]}; got {batch}")
    # On CUDA this check would wait for the device; there the embedding itself asserts.
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(f"Phi1: token ids must be between 0 and {config.vocab_size - 1}; "
                             f"got {low if low < 0 else high}")
    return batch, tokens


def row_starts(ids: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor | None:
    """Return the first real token of each row, int32 [B], or None if no row is padded. An empty cache keeps it.

    Raises:
        ValueError: the mask has another shape than ids, is not left padding, or comes after the prompt.
    """
    if cache is not None and not cache.length:
        cache.starts = None  # the cache may still hold those of a prompt that was cropped away
    if mask is None:
        return None if cache is None else cache.starts
    if mask.shape != ids.shape:
        raise ValueError(f"Phi1: attention_mask.shape must be ids.shape {tuple(ids.shape)}; "
                         f"got {tuple(mask.shape)}")
    if cache is not None and cache.length:
        raise ValueError("Phi1: attention_mask goes with the prompt, into an empty cache; "
                         f"this cache holds {cache.length} tokens")
    mask = mask.bool()
    starts = (~mask).sum(1, dtype=torch.int32)
    if not torch.compiler.is_compiling() and not bool((mask[:, 1:] >= mask[:, :-1]).all()):
        raise ValueError("Phi1: attention_mask must be left padding, zeros then ones in each row")
    if cache is not None:
        cache.starts = starts
    return starts
