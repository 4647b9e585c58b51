"""Sampling against its definition in plain Python: temperature, top k, top p and the draw."""

import math
import random

import pytest
import torch

from phi1.sampling import SamplingParams, prompt_seed, sample_tokens


def choose_one(logits, u, **options):
    params = SamplingParams.check("test", **{"max_new_tokens": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
                                             "seed": 0, "stop": (), **options})
    return sample_tokens(logits[None].float(), params, torch.tensor([u], dtype=torch.float64)).item()


def plain_choice(logits, u, temperature, top_k, top_p):
    """Apply the definition in Python's floats: temperature, then top k, then the smallest set that reaches top p."""
    values = [value / temperature for value in logits.tolist()]
    order = sorted(range(len(values)), key=lambda i: -values[i])
    if top_k:
        order = order[:top_k]
    weight = {i: math.exp(values[i] - values[order[0]]) for i in order}
    total, kept, reached = sum(weight.values()), [], 0.0
    for i in order:
        if reached >= top_p:
            break
        kept.append(i)
        reached += weight[i] / total
    goal = u * sum(weight[i] for i in kept)
    for i in sorted(kept):
        goal -= weight[i]
        if goal < 0:
            break
    return i


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (1.0, 0, 1.0), (0.2, 0, 1.0), (3.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.3), (1.0, 0, 1e-9),
    (0.7, 40, 0.9), (2.0, 3, 0.5), (1.0, 500, 0.99),
])
def test_sampling_follows_the_definition(temperature, top_k, top_p):
    numbers = random.Random(0)
    seen = set()
    for trial in range(60):
        logits = 3 * torch.randn(100, generator=torch.Generator().manual_seed(trial))
        u = numbers.random()
        token = choose_one(logits, u, temperature=temperature, top_k=top_k, top_p=top_p)
        assert token == plain_choice(logits, u, temperature, top_k, top_p)
        seen.add(token == logits.argmax().item())
    assert seen == ({True} if top_k == 1 or top_p < 1e-6 else {True, False})


def test_sampling_draws_each_token_as_often_as_its_probability():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    drawn = [choose_one(logits, (i + 0.5) / 1000) for i in range(1000)]
    assert [drawn.count(token) for token in range(4)] == [500, 250, 125, 125]
    assert choose_one(torch.tensor([-math.log(3), 0.0, -1e4]), 1 - 1e-16) == 1  # never a token of probability 0


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = torch.tensor([60000.0, -60000.0, 60001.0, 3.0])
    assert choose_one(logits, 0.999, temperature=temperature) == 2


def test_prompts_of_one_or_several_calls_have_different_seeds():
    assert prompt_seed(3, 0) == 3
    assert len({prompt_seed(seed, i) for seed in range(50) for i in range(50)}) == 2500
