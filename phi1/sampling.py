"""Which token comes next: the arguments that decide it, checked, and the choice itself.

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


@dataclass(frozen=True)
class Rules:
    """The checked arguments of a call."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | None  # None: greedy
    stop: tuple[str, ...]

    @classmethod
    def check(cls, caller: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float, seed: int | None,
              stop: str | Sequence[str]) -> Rules:
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        for name, value, holds, rule in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
            ("temperature", temperature, 0 <= temperature < math.inf, "0 (greedy) or more"),
            ("top_k", top_k, top_k >= 0, "0 (off) or more"),
            ("top_p", top_p, 0 < top_p <= 1, "greater than 0 and at most 1"),
            ("seed", seed, seed is None or seed >= 0, "0 or more"),
            ("stop", stop, all(isinstance(text, str) and text for text in stop), "texts that are not empty"),
        ):
            if not holds:
                raise ValueError(f"{caller}: {name} must be {rule}; got {value!r}")
        if temperature == 0:
            seed = None
        elif seed is None:
            seed = secrets.randbits(32)
        return cls(max_new_tokens, temperature, top_k, top_p, seed, stop)


def prompt_seed(seed: int, index: int) -> int:
    """Seed of the prompt at `index` of a list: `seed` for the first, numbers unrelated to it for the others."""
    if index == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=6).digest())


def uniform_numbers(seeds: Sequence[int | None], steps: int) -> Tensor:
    """[steps, B] float64 in [0, 1): column b from the b-th seed alone. Zeros for greedy decoding, which needs none."""
    if None in seeds:
        return torch.zeros(steps, len(seeds))
    sources = [random.Random(seed) for seed in seeds]
    return torch.tensor([[source.random() for source in sources] for _ in range(steps)], dtype=torch.float64)


def choose(logits: Tensor, rules: Rules, uniform: Tensor) -> Tensor:
    """Ids [B] for float32 logits [B, V] and numbers [B] in [0, 1)."""
    if not math.isfinite(float(logits.sum())):
        raise FloatingPointError("generate: the model's logits hold nan or inf; a float16 model may need float32")
    if rules.temperature == 0:
        return logits.argmax(-1)
    # The largest becomes 0 first, so that a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / rules.temperature
    if 0 < rules.top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(rules.top_k).values[:, -1:], -math.inf)
    if rules.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        share = ordered.softmax(-1)
        beyond = share.cumsum(-1) - share >= rules.top_p  # what comes before a token is enough without it
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -math.inf)
    # In the order of the ids, not of the probabilities: a rounding error that swaps two neighbours changes nothing.
    upto = logits.softmax(-1).double().cumsum(-1)
    drawn = torch.searchsorted(upto, (uniform * upto[:, -1])[:, None], right=True)[:, 0]
    return drawn.clamp(max=logits.shape[1] - 1)
