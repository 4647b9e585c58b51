"""Working copies: FSDP's bits without FSDP, gradients in fp32, and copies that follow the parameters."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from training_runs import make_trainer, weights_of

from phi1 import Phi1, WorkingCopies
from phi1.config import preset
from phi1.gpus import Gpu
from phi1.train.data.batch_plan import BatchPlan
from phi1.train.plan.plan import Cluster, memory, moments, states
from phi1.train.recipe.file import read_recipe
from phi1.train.runtime.engine import Engine

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
        trainer.batch_plan = BatchPlan.of(4, 2, 0, 1)
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


def test_a_changed_parameter_is_used_and_a_replaced_one_refused():
    model = make_model()
    WorkingCopies(model, torch.bfloat16)
    before = loss(model).item()
    with torch.no_grad():
        model.head.bias[:40] += 3.0
    assert abs(loss(model).item() - before) > 0.1
    model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="WorkingCopies: weight of Embedding was replaced; change it in place"):
        loss(model)


def test_a_frozen_parameter_gets_no_gradient():
    model = make_model()
    WorkingCopies(model, torch.bfloat16)
    loss(model).backward()
    model.zero_grad()
    model.embed.weight.requires_grad_(False)
    loss(model).backward()
    assert model.embed.weight.grad is None
    assert model.head.weight.grad is not None


def test_a_gradient_that_was_replaced_is_added_to():
    model, other = make_model(), make_model()
    for each in (model, other):
        WorkingCopies(each, torch.bfloat16)
        loss(each).backward()
    for parameter in model.parameters():
        parameter.grad = parameter.grad * 0.5
    loss(model).backward()
    for parameter, once in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter.grad, once.grad * 0.5 + once.grad)


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", ["backward", "arrival", "adding"])
def test_zero_grad_removes_the_rest_of_an_interrupted_backward(at, monkeypatch):
    model, other = make_model(), make_model()
    WorkingCopies(model, torch.bfloat16)
    WorkingCopies(other, torch.bfloat16)
    value = loss(model)
    if at == "backward":
        value.register_hook(interrupted)
    elif at == "arrival":
        model.loss.__self__._places[-1][-1].grad = torch.ones_like(model.head.bias, dtype=torch.bfloat16)
        value.register_hook(interrupted)
    else:
        monkeypatch.setattr(torch.Tensor, "copy_", interrupted)  # called for the first gradient that arrives
    with pytest.raises(KeyboardInterrupt):
        value.backward()
    monkeypatch.undo()
    model.zero_grad()
    for each in (model, other):
        loss(each).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"parameters must be float32; got torch\.bfloat16 of embed\.weight"):
        WorkingCopies(make_model(torch.bfloat16), torch.bfloat16)
    with pytest.raises(TypeError, match=r"dtype must be float16, bfloat16 or float32; got torch\.int8"):
        WorkingCopies(make_model(), torch.int8)


def test_a_failing_loss_or_copy_leaves_the_parameters_in_place():
    model = make_model()
    own = list(model.parameters())
    WorkingCopies(model, torch.bfloat16)
    with pytest.raises(ValueError, match="token ids must be between"):
        model.loss(IDS[0] + 128, TARGETS[0])
    for copies in (copy.deepcopy, pickle.dumps):  # a copy would train nothing
        with pytest.raises(TypeError, match="can be neither copied nor pickled; save its state_dict"):
            copies(model)
    assert all(a is b for a, b in zip(own, model.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_plan_knows_what_a_process_alone_holds(small_corpus, engines, precision):
    trainer = make_trainer(small_corpus, engines, precision, micro_batch_size=2)
    trainer.batch_plan = BatchPlan.of(4, 2, 0, 1)
    trainer.optimizer.zero_grad = lambda **_: None
    trainer.run_step()
    model = trainer.model

    def bytes_of(tensors):
        return sum(x.numel() * x.element_size() for x in {x.data_ptr(): x for x in tensors}.values())

    own = [x.to_local() for x in model.parameters()]
    addresses = {x.data_ptr() for x in own}
    held = [bytes_of(own), bytes_of(x.grad.to_local() for x in model.parameters()),
            bytes_of(state[name].to_local() for state in trainer.optimizer.state.values()
                     for name in ("exp_avg", "exp_avg_sq")),
            bytes_of(x for *_, x in model.loss.__self__._places if x.data_ptr() not in addresses), 0]
    element = 4 if precision == "fp32" else 2
    assert list(states(model.config, 1, element, 2, alone=True).values()) == pytest.approx(held, rel=0.03)


def test_only_the_plan_of_a_process_alone_goes_without_fsdps_buffers():
    recipe = read_recipe(None, {"train.precision": "fp32", "train.batch_size": "4"})
    gpu = Gpu("cpu", "", 8.0, 1, 1, 1, 1, "a test")
    alone, pair, on_gpu = (memory(recipe, Cluster(gpu, processes, of=of), 1)
                           for processes, of in ((1, "process"), (2, "process"), (1, "GPU")))
    for name in ("parameters, gathered, 32 bits", "gradients of the micro-steps, fp32"):
        assert alone[name] == 0 < pair[name] == on_gpu[name]
    largest = {name for name, _ in moments(recipe, Cluster(gpu, 1, of="process"), 1)}
    assert {name for name, _ in moments(recipe, Cluster(gpu, 1), 1)} - largest == {"buffers of the largest reduction"}


def test_only_a_process_alone_on_a_cpu_goes_without_fsdp(engines):
    engine = engines["bf16"]
    assert engine.is_alone
    assert not replace(engine, world_size=2).is_alone
    assert not replace(engine, device=torch.device("cuda", 0)).is_alone
