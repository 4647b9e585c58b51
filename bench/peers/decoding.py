"""Decoding of given tokens, one at a time, with each kind of cache. The first call also runs the prompt.

A function takes ids [B, T + n]: T tokens of prompt, then n tokens one by one. It returns the logits after the last
[B, 1, V], and the cache forgets the n tokens, so that each call does the same work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from phi1.bench.harness.case import Function, Inputs
from phi1.model import Cache, Phi1


def phi1_cache(model: Phi1, prompt: int) -> Function:
    """phi1's own cache."""
    def fill(ids: torch.Tensor) -> Cache:
        weight = model.embed.weight
        cache = Cache(model.config, ids.shape[0], ids.shape[1], device=weight.device, dtype=weight.dtype)
        model(ids[:, :prompt], cache=cache, logits_to_keep=1)
        return cache

    def forget(cache: Cache, count: int) -> None:
        cache.crop(cache.length - count)

    return _decoder(prompt, fill, lambda ids, cache: model(ids, cache=cache, logits_to_keep=1), forget)


def dynamic_cache(model: Any, prompt: int) -> Function:
    """transformers' usual cache, which grows."""
    from transformers import DynamicCache

    def fill(ids: torch.Tensor) -> Any:
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def step(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        return model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    return _decoder(prompt, fill, step, lambda cache, count: cache.crop(-count))


def static_cache(model: Any, prompt: int, new: int) -> Function:
    """transformers' cache of fixed size, with a step compiled into CUDA graphs: its fastest way."""
    from transformers import StaticCache

    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

    def fill(ids: torch.Tensor) -> Any:
        cache = StaticCache(config=model.config, max_cache_len=prompt + new)
        model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def step(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(input_ids=ids.clone(), past_key_values=cache, use_cache=True, logits_to_keep=1).logits.clone()

    def forget(cache: Any, count: int) -> None:
        for layer in cache.layers:
            layer.cumulative_length.sub_(count)

    return _decoder(prompt, fill, step, forget)


def _decoder(prompt: int, fill: Callable[[torch.Tensor], Any], step: Callable[[torch.Tensor, Any], torch.Tensor],
             forget: Callable[[Any, int], None]) -> Function:
    caches: dict[int, Any] = {}

    def run(inputs: Inputs) -> torch.Tensor:
        ids = inputs["ids"]
        key = ids.data_ptr()
        if key not in caches:
            caches[key] = fill(ids)
        for position in range(prompt, ids.shape[1]):
            logits = step(ids[:, position : position + 1], caches[key])
        forget(caches[key], ids.shape[1] - prompt)
        return logits

    return run
