"""Sampling: the checked arguments of a call, and the next token of each prompt.

B prompts in a batch, V ids that have a token.
"""

from __future__ import annotations

import hashlib
import math
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phi1.arguments import check_real, check_text, check_whole, require, shown


@dataclass(frozen=True)
class SamplingParams:
    """The checked arguments that decide how tokens are chosen."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None  # None: greedy
    stop: tuple[str, ...]

    @classmethod
    def check(cls, caller: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int | None,
              stop: str | Sequence[str]) -> SamplingParams:
        check_whole(caller, low=1, max_new_tokens=max_new_tokens)
        check_real(caller, temperature=temperature, top_p=top_p)
        check_whole(caller, top_k=top_k)
        if seed is not None:
            check_whole(caller, seed=seed)
        if not isinstance(stop, str | tuple | list):
            raise TypeError(f"{caller}: stop must be a str or a list of them; got {shown(stop)}")
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        check_text(caller, **{f"stop[{i}]": text for i, text in enumerate(stop)})
        for name, value, holds, rule in (
            ("temperature", temperature, temperature >= 0, "0 (greedy) or more"),
            ("top_k", top_k, top_k >= 0, "0 (off) or more"),
            ("top_p", top_p, 0 < top_p <= 1, "greater than 0 and at most 1"),
            ("seed", seed, seed is None or seed >= 0, "0 or more"),
            ("stop", stop, all(stop), "texts that are not empty"),
        ):
            require(holds, caller, f"{name} must be {rule}", shown(value))
        if temperature == 0:
            seed = None
        elif seed is None:
            seed = secrets.randbits(32)
        # Numbers of NumPy would count in 8 bits, or give another seed to `random`.
        seed = None if seed is None else int(seed)
        return cls(int(max_new_tokens), float(temperature), int(top_k), float(top_p), seed, stop)


def prompt_seed(seed: int, index: int) -> int:
    """Return the seed of the prompt at `index`: `seed` for the first, a hash of seed and index for the others."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=6).digest())


def uniform_numbers(seeds: Sequence[int | None], steps: int) -> Tensor:
    """Return [steps, B] float64 in [0, 1), column b from the b-th seed; zeros for greedy decoding, which needs none."""
    if None in seeds:
        return torch.zeros(steps, len(seeds))
    sources = [random.Random(seed) for seed in seeds]
    return torch.tensor([[source.random() for source in sources] for _ in range(steps)], dtype=torch.float64)


def sample_tokens(logits: Tensor, params: SamplingParams, uniform: Tensor) -> Tensor:
    """Return ids [B] for float32 logits [B, V] and uniform numbers [B] in [0, 1)."""
    if not math.isfinite(float(logits.sum())):
        raise FloatingPointError("generate: the model's logits hold nan or inf; a float16 model may need float32")
    if params.temperature == 0:
        return logits.argmax(-1)
    # The largest logit becomes 0 first, so a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / params.temperature
    if 0 < params.top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[:, -1:], -math.inf)
    if params.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= params.top_p  # the tokens before this one already hold top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    # The sum runs in the order of the ids: in the order of probabilities, a rounding error could swap two tokens.
    upto = logits.softmax(-1).double().cumsum(-1)
    drawn = torch.searchsorted(upto, (uniform * upto[:, -1])[:, None], right=True)[:, 0]
    return drawn.clamp(max=logits.shape[1] - 1)
