"""The whole model on the Triton kernels, in training and in evaluation (run by test_interpreter.py without a GPU)."""

import pytest
import torch

from phi1 import testing
from phi1.config import preset
from phi1.kernels import backend
from phi1.model import Cache, Phi1

DEVICE = testing.kernel_device()
if DEVICE is None:
    pytest.skip("no GPU: test_interpreter.py runs these", allow_module_level=True)

STEPS, BATCH, TOKENS, VOCAB = 5, 2, 10, 130


def model(dropout=0.0):
    config = preset("nano", vocab_size=VOCAB, hidden_size=32, intermediate_size=80, num_hidden_layers=2,
                    num_attention_heads=2, rotary_dim=8, max_position_embeddings=32, attention_dropout=dropout,
                    residual_dropout=dropout)
    built = Phi1(config, device=DEVICE)
    built.init_weights(0)
    return built


def ids(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def train(name, dropout):
    """Train a few steps; return their losses and the last step's gradients."""
    trained, batches, losses = model(dropout), ids(STEPS, BATCH, TOKENS), []
    optimizer = torch.optim.AdamW(trained.parameters(), lr=3e-3)
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        drawn = {}
        if dropout:
            drawn = {"rng": torch.tensor([3, step], device=DEVICE), "sample_ids": torch.tensor([7, 9], device=DEVICE)}
        with backend(name):
            loss = trained.loss(batch[:, :-1], batch[:, 1:], **drawn)
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {parameter: x.grad for parameter, x in trained.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_gives_the_reference_losses(dropout):
    losses, gradients = train("triton", dropout)
    expected, wanted = train("reference", dropout)
    assert losses == pytest.approx(expected, abs=1e-5)
    for name, gradient in gradients.items():
        # Adam divides by the gradients' size, so roundings move the weights and with them later gradients.
        assert (gradient - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max(), name


def test_left_padded_prompts_and_decoding_give_the_reference_logits():
    evaluated, prompt = model().eval(), ids(BATCH, TOKENS)
    mask = torch.ones_like(prompt)
    mask[1, :5] = 0
    logits = {}
    for name in ("triton", "reference"):
        cache = Cache(evaluated.config, BATCH, TOKENS + 1, device=DEVICE)
        with torch.no_grad(), backend(name):
            whole = evaluated(prompt, attention_mask=mask)
            first = evaluated(prompt, attention_mask=mask, cache=cache, logits_to_keep=1)
            decoded = torch.cat((first, evaluated(prompt[:, :1], cache=cache)), dim=1)
        logits[name] = whole[mask.bool()], decoded
    torch.testing.assert_close(logits["triton"], logits["reference"], rtol=1e-5, atol=1e-5)
