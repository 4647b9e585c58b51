"""The key-value cache of generation: L layers, B batch, T tokens, H heads, K head size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from phi1.arguments import check_instance, check_whole, require
from phi1.config import Phi1Config
from phi1.kernels.core.checks import check_device_option, check_dtype_option


class Cache:
    """Keys (rotated) and values of the tokens seen so far, for `Phi1.forward(..., cache=cache)`.

    Args:
        config: the model's configuration.
        batch: B, the number of sequences that are decoded together, 1 or more.
        max_length: T, the tokens that fit, at most config.max_position_embeddings.
        device, dtype: the model's device and dtype.

    Raises:
        TypeError: an argument has another type.
        ValueError: a number is out of its range, or there is no such device.
    """

    def __init__(self, config: Phi1Config, batch: int, max_length: int, *,
                 device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        check_instance("Cache", "config", config, Phi1Config, "a phi1.Phi1Config")
        check_whole("Cache", batch=batch, max_length=max_length)
        require(batch >= 1, "Cache", "batch must be 1 or more", batch)
        require(1 <= max_length <= config.max_position_embeddings, "Cache",
                f"max_length must be between 1 and {config.max_position_embeddings}, the model's context", max_length)
        check_device_option("Cache", device)
        check_dtype_option("Cache", dtype)
        shape = (config.num_hidden_layers, 2, batch, max_length, config.num_attention_heads, config.head_dim)
        require(math.prod(shape) < 2**60, "Cache", "batch must leave the cache a size that memory can have", batch)
        self.kv = torch.empty(shape, device=device, dtype=dtype)  # [L, 2, B, T, H, K]
        self.length = 0
        self.starts: Tensor | None = None  # [B] first real token of each left-padded row

    @property
    def max_length(self) -> int:
        """The number of tokens that fit."""
        return self.kv.shape[3]

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens. Raises TypeError or ValueError unless so many are held."""
        check_whole("Cache.crop", length=length)
        require(0 <= length <= self.length, "Cache.crop",
                f"length must be between 0 and {self.length}, the tokens held", length)
        self.length = int(length)

    def room(self, layer: int, tokens: int) -> Tensor:
        """Return a view [2, B, length + tokens, H, K] of a layer's cache, whose last `tokens` the caller fills."""
        return self.kv[layer, :, :, : self.length + tokens]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, T, H, K] of new tokens; return all keys and values [B, length + T, H, K] as views."""
        end = self.length + k.shape[1]
        self.kv[layer, 0, :, self.length : end] = k
        self.kv[layer, 1, :, self.length : end] = v
        return self.kv[layer, 0, :, :end], self.kv[layer, 1, :, :end]
