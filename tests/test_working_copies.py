"""Working copies: FSDP's bits without FSDP, gradients in fp32, and parameters that are always the newest."""

from dataclasses import replace

import pytest
import torch

from phi1 import Phi1
from phi1.config import preset
from phi1.train.batches import Layout
from phi1.train.engine import Engine
from phi1.train.testing import make_trainer, weights_of
from phi1.working_copies import WorkingCopies

CONFIG = preset("nano", vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=1, max_position_embeddings=16)
IDS, TARGETS = torch.randint(128, (2, 3, 9), generator=torch.Generator().manual_seed(0)).split(1)


def make_model(dtype=torch.float32):
    model = Phi1(CONFIG, dtype=torch.float32)
    model.init_weights(1)
    return model.to(dtype)


def loss(model):
    return model.loss(IDS[0], TARGETS[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_process_alone_computes_the_bits_of_fsdp(small_corpus, engines, precision, monkeypatch):
    trainers = []
    for is_alone in (True, False):
        monkeypatch.setattr(Engine, "is_alone", is_alone)
        trainer = make_trainer(small_corpus, engines, precision, micro_batch_size=2)
        trainer.layout = Layout.of(4, 2, 0, 1)
        trainers.append(trainer)
    for _ in range(4):
        own, fsdp = (trainer.run_step() for trainer in trainers)
        assert own == fsdp
    own, fsdp = (weights_of(trainer) for trainer in trainers)
    assert all(torch.equal(own[name], fsdp[name]) for name in own)


def test_gradients_are_those_of_a_model_in_that_precision_and_add_up_in_fp32():
    model, narrow = make_model(), make_model(torch.bfloat16)
    WorkingCopies(model, torch.bfloat16)
    for count in (1, 2):
        assert torch.equal(loss(model), loss(narrow))
        loss(model).backward()
        narrow.zero_grad()
        loss(narrow).backward()
        for (name, parameter), expected in zip(model.named_parameters(), narrow.parameters(), strict=True):
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert torch.equal(parameter.grad, count * expected.grad.float()), name


def test_what_changes_the_parameters_is_seen():
    model = make_model()
    WorkingCopies(model, torch.bfloat16)
    before = loss(model).item()
    with torch.no_grad():
        model.head.bias[:40] += 3.0
    assert abs(loss(model).item() - before) > 0.1


def test_a_loss_that_fails_leaves_the_parameters_where_they_were():
    model = make_model()
    own = list(model.parameters())
    WorkingCopies(model, torch.bfloat16)
    with pytest.raises(ValueError, match="token ids must be between"):
        model.loss(IDS[0] + 128, TARGETS[0])
    assert all(a is b for a, b in zip(own, model.parameters(), strict=True))


def test_only_a_process_alone_on_a_cpu_goes_without_fsdp(engines):
    engine = engines["bf16"]
    assert engine.is_alone
    assert not replace(engine, world_size=2).is_alone
    assert not replace(engine, device=torch.device("cuda", 0)).is_alone
