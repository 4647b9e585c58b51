"""Rules of the model's inputs: token ids, the padding mask, and the room that the context and the cache have."""

from __future__ import annotations

import torch
from torch import Tensor

from phi1.arguments import check_instance, require
from phi1.cache import Cache
from phi1.config import Phi1Config
from phi1.kernels.core.checks import check_device, check_dtype, check_shape, check_tensors


def check_ids(config: Phi1Config, ids: Tensor, like: Tensor, cache: Cache | None) -> tuple[int, int]:
    """Return (B, T) of ids [B, T], which are on the device of `like`, the model.

    Raises:
        TypeError: ids are no tensor, or cache is no Cache.
        ValueError: ids are not int64 [B, T], lie outside the vocabulary, or do not fit the context or the cache.
    """
    check_tensors("Phi1", ids=ids)
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(f"Phi1: ids must be int64 [B, T]; got {ids.dtype} {list(ids.shape)}")
    check_device("Phi1", "ids", ids, "the model", like)
    if cache is not None:
        check_instance("Phi1", "cache", cache, Cache, "a phi1.Cache or None")
        layers, _, _, _, *head = cache.kv.shape
        require([layers, *head] == [config.num_hidden_layers, config.num_attention_heads, config.head_dim], "Phi1",
                "cache must be one of the model's own configuration", f"shape {list(cache.kv.shape)}")
        check_device("Phi1", "cache", cache.kv, "the model", like)
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
    check_tensors("Phi1", attention_mask=mask)
    check_shape("Phi1", "attention_mask", mask, ids.shape, "ids'")
    check_device("Phi1", "attention_mask", mask, "ids", ids)
    require(not mask.is_complex(), "Phi1", "attention_mask must be bool, or numbers of 0 and 1", mask.dtype)
    if cache is not None and cache.length:
        raise ValueError("Phi1: attention_mask goes with the prompt, into an empty cache; "
                         f"this cache holds {cache.length} tokens")
    given, mask = mask, mask.bool()
    starts = (~mask).sum(1, dtype=torch.int32)
    if not torch.compiler.is_compiling() and not mask.is_meta:
        right = (mask[:, 1:] >= mask[:, :-1]).all()
        if given.dtype != torch.bool:
            right &= (given == mask).all()  # one answer, for which a GPU is waited for once
        if not bool(right):
            raise ValueError("Phi1: attention_mask must be left padding, zeros then ones in each row; got "
                             f"{given[(mask != given).any(1) | (mask[:, 1:] < mask[:, :-1]).any(1)][0].tolist()[:20]}")
    if cache is not None:
        cache.starts = starts
    return starts


def check_positions(ids: Tensor, positions: Tensor) -> None:
    """Raise unless positions are whole numbers [B, T] on the device of ids. The first block checks their values."""
    check_tensors("Phi1", positions=positions)
    require(positions.dtype in (torch.int32, torch.int64), "Phi1", "positions must be int32 or int64", positions.dtype)
    check_shape("Phi1", "positions", positions, ids.shape, "ids'")
    check_device("Phi1", "positions", positions, "ids", ids)


def check_targets(ids: Tensor, targets: Tensor, rng: Tensor | None, sample_ids: Tensor | None) -> None:
    """Raise unless the tensors of a loss are int64, of their shapes and on the device of ids."""
    check_tensors("Phi1.loss", targets=targets)
    check_dtype("Phi1.loss", "targets", targets, torch.int64)
    check_shape("Phi1.loss", "targets", targets, ids.shape, "ids'")
    check_device("Phi1.loss", "targets", targets, "ids", ids)
    for name, numbers, shape, why in (("rng", rng, (2,), "the seed and the step"),
                                      ("sample_ids", sample_ids, ids.shape[:1], "one per row of ids")):
        if numbers is not None:
            check_tensors("Phi1.loss", **{name: numbers})
            check_dtype("Phi1.loss", name, numbers, torch.int64)
            check_shape("Phi1.loss", name, numbers, shape, why)
            check_device("Phi1.loss", name, numbers, "ids", ids)
