"""`pytest --benchmark`: one optimizer step on the CPU, phi1's trainer and transformers, at two vocabularies."""

import pytest
import torch

from phi1.bench.cpu_training import PROVIDERS, STEPS


@pytest.mark.parametrize("vocab_size", [4096, 51200])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_training_step(benchmark, provider, vocab_size):
    benchmark.group = f"training step, 8 x 256 tokens, V = {vocab_size}, bf16, CPU"
    step = STEPS[provider](vocab_size)
    benchmark.pedantic(step, rounds=5, warmup_rounds=2)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
