"""The whole model: loss without gradients, a training micro-step, an optimizer step, prefill and decoding.

A model's weights are no input: every provider makes the same ones from a seed when it prepares. On a GPU the float64
reference computes losses and logits; gradients of the whole are compared on a CPU, and block by block on a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from phi1.bench.harness.case import BOTH, Case, Function, Inputs, Provider, named
from phi1.bench.harness.inputs import Draw
from phi1.bench.harness.providers import MAX_AUTOTUNE, ours_prepared, peer
from phi1.bench.peers.hf_transformers import causal_model
from phi1.bench.peers.training import Phi1Step, Plan, TransformersStep, cpu_plan
from phi1.config import Phi1Config, preset
from phi1.kernels import backend
from phi1.model import Cache, Phi1

TINY = preset("nano", vocab_size=512, num_hidden_layers=2)
NEW = 16  # tokens that one call of decoding takes
LOSS_SCALE = 1024.0  # as a float16 run has one: the gradient of a mean over 16,384 tokens would flush to 0
# A token takes 2 flops a parameter that multiplies, P, and half of T scores and T sums a head; backward twice that.
FORWARD_FLOPS = "2*B*T*(P + L*T*D)"
TRAIN_FLOPS = "6*B*T*(P + L*T*D)"


def cases() -> list[Case]:
    """Every case of the whole model."""
    phi1 = preset("phi1")
    dropped = preset("phi1", attention_dropout=0.1, residual_dropout=0.1)
    found = [_loss(phi1, 8, 2048, "float16", "cuda", quick=True), _loss(TINY, 2, 64, "float32", "cpu", quick=True),
             _micro_step(phi1, 8, 2048, "float16", "cuda", quick=True),
             _micro_step(dropped, 8, 2048, "float16", "cuda"),
             _micro_step(TINY, 2, 64, "float32", "cpu", quick=True),
             _step(Plan(phi1, 8, 2048, "cuda", "fp16"), quick=True), _step(Plan(dropped, 8, 2048, "cuda", "fp16")),
             _step(Plan(phi1, 64, 2048, "cuda", "fp16", micro_batch=8)),
             *(_step(cpu_plan(vocab), quick=vocab == 4096) for vocab in (4096, 51200))]
    found += [_prefill(phi1, 1, tokens, "float16", "cuda", quick=tokens == 512) for tokens in (512, 2016)]
    found += [_decode(phi1, batch, tokens, "float16", "cuda", quick=tokens == 512 and batch == 1)
              for batch, tokens in ((1, 512), (1, 2016), (8, 512))]
    return [*found, _prefill(TINY, 1, 64, "float32", "cpu", quick=True),
            _decode(TINY, 1, 64, "float32", "cpu", quick=True),
            _prefill(preset("phi1-small"), 1, 256, "float16", "cpu", readme=True),
            _decode(preset("phi1-small"), 1, 64, "float16", "cpu", readme=True)]


def _shape(config: Phi1Config, batch: int, tokens: int) -> dict[str, Any]:
    """Letters of the formulas; P leaves out the embedding, which is read by rows."""
    d, v = config.hidden_size, config.vocab_size
    shape = {"B": batch, "T": tokens, "L": config.num_hidden_layers, "D": d, "V": v,
             "P": config.num_parameters - v * d}
    return shape | ({"dropout": config.residual_dropout} if config.residual_dropout else {})


def _case(op: str, config: Phi1Config, batch: int, tokens: int, dtype: str, device: str, direction: str = "forward",
          new: int = 0, **fields: Any) -> Case:
    """A case whose inputs are ids and targets [B, T + new], and an empty tensor that tells the reference its dtype."""
    shape = _shape(config, batch, tokens)
    label = {letter: value for letter, value in shape.items() if letter != "P"}

    def inputs(draw: Draw) -> Inputs:
        rows = draw.integers(config.vocab_size, batch, tokens + new + 1)
        return {"ids": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous(), "like": draw.normal(0)}

    return Case(**{"inputs": inputs} | fields, name=named(op, label, dtype, direction, device), op=op, unit="model",
                direction=direction, shape=shape, dtype=dtype, devices=(device,), leaves=("like",),
                exclusive=device == "cuda")


def build(config: Phi1Config, device: torch.device, dtype: torch.dtype) -> Phi1:
    """phi1 with the weights of a fixed seed; biases and norms are given values too, so that each of them counts."""
    model = Phi1(config, device=device, dtype=torch.float32)
    model.init_weights(1)
    generator = torch.Generator(device).manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn(parameter.shape, device=device, generator=generator), alpha=0.05)
    return model.to(dtype).eval()


def _built(case: Case, config: Phi1Config, device: torch.device) -> Phi1:
    return build(config, device, getattr(torch, case.dtype))


def _reference(config: Phi1Config, dtype: str, compute: Any) -> Function:
    """`compute(model, inputs)` under the specification, on a model widened to the dtype of `like`."""
    def run(inputs: Inputs) -> Any:
        like = inputs["like"]
        model = build(config, like.device, getattr(torch, dtype)).to(like.dtype)
        with backend("reference"):
            return compute(model, inputs)

    return run


def _mean_loss(model: Phi1, inputs: Inputs) -> torch.Tensor:
    """The loss of one sample after another, since the scores of all would not fit."""
    rows = zip(inputs["ids"].split(1), inputs["targets"].split(1), strict=True)
    with torch.no_grad():
        return torch.stack([model.loss(ids, targets).double() for ids, targets in rows]).mean()


def _providers(config: Phi1Config, ours: Any, theirs: Any, *, training: bool = False) -> tuple[Provider, ...]:
    """phi1, and transformers eager, compiled, and compiled at its best.

    Args:
        config: the model's shape; its dropout counts where `training`.
        ours: (model) -> function.
        theirs: (model, the model as it is called) -> function.
        training: in train mode, else in eval mode.
    """
    def phi1(case: Case, on: torch.device) -> Function:
        return ours(_built(case, config, on).train(training))

    def transformers(mode: str | None) -> Any:
        def prepare(case: Case, on: torch.device) -> Function:
            model = causal_model(_built(case, config, on), config, config.residual_dropout).train(training)
            return theirs(model, torch.compile(model, dynamic=False, mode=mode) if mode else model)

        return prepare

    return ours_prepared(phi1), *_transformers(transformers)


def _transformers(prepare: Any) -> tuple[Provider, ...]:
    """The three ways to call transformers; `prepare(mode of torch.compile)` makes each one's preparation."""
    compiled: dict[str, Any] = {"package": "transformers", "by_default": ("cuda",)}
    return (Provider("transformers", prepare(None), package="transformers"),
            Provider("transformers-compiled", prepare("default"), **compiled),
            Provider("transformers-max", prepare(MAX_AUTOTUNE), slow=True, **compiled))


def _loss(config: Phi1Config, batch: int, tokens: int, dtype: str, device: str, quick: bool = False) -> Case:
    return _case("model-loss", config, batch, tokens, dtype, device, bytes="(P + 2*B*T*D)*e", flops=FORWARD_FLOPS,
                 quick=quick,
                 providers=_providers(config, lambda model: lambda inputs: model.loss(inputs["ids"], inputs["targets"]),
                                      lambda model, forward: lambda inputs: _their_loss(forward, inputs)),
                 reference=_reference(config, dtype, _mean_loss))


def _their_loss(forward: Any, inputs: Inputs) -> torch.Tensor:
    logits = forward(input_ids=inputs["ids"], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), inputs["targets"].flatten())


def _micro_step(config: Phi1Config, batch: int, tokens: int, dtype: str, device: str, quick: bool = False) -> Case:
    def ours(model: Phi1) -> Function:
        on = model.embed.weight.device
        rng, weight = torch.tensor([1, 1], device=on), model.get_parameter("blocks.0.norm.weight")

        def run(inputs: Inputs) -> tuple[torch.Tensor, ...]:
            loss = model.loss(inputs["ids"], inputs["targets"], rng=rng, sample_ids=torch.arange(batch, device=on))
            return _gradients(model, loss, weight)

        return run

    def theirs(model: Any, forward: Any) -> Function:
        weight = model.model.layers[0].input_layernorm.weight
        return lambda inputs: _gradients(model, _their_loss(forward, inputs), weight)

    def exact(model: Phi1, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            loss = model.loss(inputs["ids"], inputs["targets"])
            return _gradients(model, loss, model.get_parameter("blocks.0.norm.weight"))

    reference = _reference(config, dtype, _mean_loss if device == "cuda" else exact)
    return _case("micro-step", config, batch, tokens, dtype, device, "call", bytes="3*P*e", flops=TRAIN_FLOPS,
                 quick=quick, providers=_providers(config, ours, theirs, training=True),
                 reference=None if config.residual_dropout else reference)


def _gradients(model: torch.nn.Module, loss: torch.Tensor, weight: torch.nn.Parameter) -> tuple[torch.Tensor, ...]:
    """Backward; the loss, and on a CPU the gradient that has passed through every layer."""
    model.zero_grad(set_to_none=True)
    (loss * LOSS_SCALE).backward()
    assert weight.grad is not None
    return (loss.detach(),) if loss.device.type == "cuda" else (loss.detach(), weight.grad.float() / LOSS_SCALE)


def _step(plan: Plan, quick: bool = False) -> Case:
    def theirs(mode: str | None) -> Any:
        return lambda case, on: TransformersStep(plan, mode)

    @cache
    def judged(precision: str) -> tuple[torch.Tensor, ...]:
        # In float32 a GPU has no room for a batch that fits in 16 bits.
        return TransformersStep(replace(plan, precision=precision, micro_batch=int(plan.device == "cuda"))).judged()

    def reference(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return judged("fp32" if inputs["like"].dtype == torch.float64 else plan.precision)

    dtype = "bfloat16" if plan.precision == "bf16" else "float16"
    return _case("train-step", plan.config, plan.batch, plan.tokens, dtype, plan.device, "call",
                 # read and write master weights and two states in float32, read the gradient
                 bytes="28*P", flops=TRAIN_FLOPS, quick=quick, readme=True,
                 inputs=lambda draw: {"like": draw.normal(0)},
                 providers=(ours_prepared(lambda case, on: Phi1Step(plan)), *_transformers(theirs)),
                 # Each draws a dropout of its own.
                 reference=None if plan.config.residual_dropout else reference, asked=_judged)


def _judged(step: Any, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return step.judged()


def _prefill(config: Phi1Config, batch: int, tokens: int, dtype: str, device: str, quick: bool = False,
             readme: bool = False) -> Case:
    def ours(model: Phi1) -> Function:
        def run(inputs: Inputs) -> torch.Tensor:
            cache = Cache(config, batch, tokens, device=inputs["ids"].device, dtype=model.embed.weight.dtype)
            return model(inputs["ids"], cache=cache, logits_to_keep=1)

        return run

    def theirs(model: Any, forward: Any) -> Function:
        return lambda inputs: forward(input_ids=inputs["ids"], use_cache=True, logits_to_keep=1).logits

    return _case("prefill", config, batch, tokens, dtype, device, bytes="(P + 2*L*B*T*D)*e",
                 flops="2*B*T*(P - V*D + L*T*D) + 2*B*V*D", quick=quick, readme=readme,
                 providers=_providers(config, ours, theirs), reference=_reference(config, dtype, _last_logits))


def _last_logits(model: Phi1, inputs: Inputs) -> torch.Tensor:
    return model(inputs["ids"], logits_to_keep=1)


def _decode(config: Phi1Config, batch: int, tokens: int, dtype: str, device: str, quick: bool = False,
            readme: bool = False) -> Case:
    """NEW given tokens, one at a time, behind a prompt. One call takes all of them and then forgets them."""
    from phi1.bench.peers.decoding import dynamic_cache, phi1_cache, static_cache

    return _case("decode", config, batch, tokens, dtype, device, new=NEW,
                 bytes=f"{NEW}*(P + 2*L*B*T*D)*e", flops=f"{NEW}*2*B*(P + 2*L*T*D)",
                 quick=quick, readme=readme, reference=_reference(config, dtype, _last_logits),
                 providers=(
                     ours_prepared(lambda case, on: phi1_cache(_built(case, config, on), tokens)),
                     peer("transformers", "transformers", lambda case: dynamic_cache(
                         causal_model(_built(case, config, torch.device(device)), config).eval(), tokens),
                         BOTH),
                     Provider("transformers-static", lambda case, on: static_cache(
                         causal_model(_built(case, config, on), config).eval(), tokens, NEW),
                         package="transformers", by_default=("cuda",)),
                 ))
