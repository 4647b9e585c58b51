"""One optimizer step: updates, skipped steps and their reasons, and equal results for any cut of the batch."""

import math
import re
from dataclasses import replace

import pytest
import torch
from training_runs import make_trainer, save_checkpoint, weights_of

from phi1.train.checkpoint.checkpoint import load_checkpoint
from phi1.train.data.batch_plan import BatchPlan
from phi1.train.recipe.recipe import Train
from phi1.train.step.schedule import learning_rate


def test_the_loss_falls_and_every_parameter_moves(small_corpus, engines):
    trainer = make_trainer(small_corpus, engines)
    before = weights_of(trainer)
    losses = [trainer.run_step().loss for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5
    after = weights_of(trainer)
    for name in before:
        assert not torch.equal(before[name], after[name]), name


def test_accumulation_and_resharding_change_nothing_but_rounding(small_corpus, engines):
    losses = {}
    for micro in (1, 2, 4):
        trainer = make_trainer(small_corpus, engines, micro_batch_size=micro)
        trainer.batch_plan = BatchPlan.of(4, micro, 0, 1)
        losses[micro] = torch.tensor([trainer.run_step().loss for _ in range(8)])
    trainer = make_trainer(small_corpus, {"fp32": replace(engines["fp32"], reshard=True)})
    losses["reduced after each micro-step"] = torch.tensor([trainer.run_step().loss for _ in range(8)])
    for found in losses.values():
        assert ((found / losses[4]) - 1).abs().max() < 1e-5


def poisoned(loss):
    """Return the same loss with a gradient that overflows."""
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    return lambda *args, **kwargs: Overflow.apply(loss(*args, **kwargs))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_not_finite_is_skipped_and_uses_up_its_batch(small_corpus, engines, precision, monkeypatch):
    trainer = make_trainer(small_corpus, engines, precision)
    trainer.run_step()
    healthy = weights_of(trainer)
    monkeypatch.setattr(trainer.model, "loss", poisoned(trainer.model.loss))
    moments = [state["exp_avg"].to_local().clone() for state in trainer.optimizer.state.values()]
    outcome = trainer.run_step()
    monkeypatch.undo()
    assert outcome.skipped
    assert math.isfinite(outcome.loss)
    assert outcome.step == trainer.finished == 2
    assert trainer.skipped == 1
    assert all(torch.equal(healthy[name], tensor) for name, tensor in weights_of(trainer).items())
    assert all(torch.equal(a, state["exp_avg"].to_local())
               for a, state in zip(moments, trainer.optimizer.state.values(), strict=True))
    assert trainer.scaler.scale == outcome.scale == (65536 if precision == "fp16" else 1)
    assert trainer.scaler.patience == (1 if precision == "fp16" else 2)
    following = trainer.run_step()
    assert not following.skipped
    assert following.samples != outcome.samples
    assert following.lr == learning_rate(2, trainer.train)


def test_fp16_finds_a_loss_scale_by_itself(small_corpus, engines):
    trainer = make_trainer(small_corpus, engines, "fp16", loss_scale=2.0**30)
    outcomes = [trainer.run_step() for _ in range(20)]
    skipped = [outcome.skipped for outcome in outcomes]
    assert skipped[0]
    first = skipped.index(False)
    assert [outcome.scale for outcome in outcomes[:first + 1]] == [2.0 ** min(30, 31 - i) for i in range(first + 1)]
    assert outcomes[-1].loss < outcomes[0].loss - 0.1


def test_clipping_bounds_the_update_by_the_global_norm(small_corpus, engines):
    trainer = make_trainer(small_corpus, engines, clip=0.01)
    seen = []
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(torch.sqrt(sum(
        parameter.grad.to_local().double().square().sum() for parameter in trainer.model.parameters()))))
    outcome = trainer.run_step()
    assert outcome.norm > 0.01
    assert float(seen[0]) == pytest.approx(0.01, rel=1e-6)


def test_the_rate_warms_up_and_falls_linearly():
    train = Train(steps=100, warmup_steps=10, lr=1.0, min_lr=0.1)
    rates = [learning_rate(step, train) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert learning_rate(50, Train(steps=50, schedule_steps=90, warmup_steps=10, lr=1.0)) == pytest.approx(0.5)


def test_the_first_tensor_that_is_not_finite_is_named(small_corpus, engines):
    trainer = make_trainer(small_corpus, engines, find_nonfinite=True)
    trainer.run_step()
    healthy = weights_of(trainer)
    with torch.no_grad():
        trainer.model.blocks[1].in_proj.weight.to_local()[3, 5] = float("inf")
    outcome = trainer.run_step()
    assert outcome.skipped
    assert re.fullmatch(r"its gradient is not finite; first not finite: blocks\.1, phi1::parallel_block, forward: "
                        r"result \[64, 32\] float32, largest finite value .*; blocks\.1\.in_proj\.weight is not finite "
                        r"itself; samples \[\d+, \d+\], micro-step 1, rank 0", trainer.problem), trainer.problem
    with torch.no_grad():
        trainer.model.blocks[1].in_proj.weight.to_local()[3, 5] = healthy["blocks.1.in_proj.weight"][3, 5]
    assert not trainer.run_step().skipped


@pytest.mark.parametrize(("loss_scale", "first"), [
    (2.0**40, r"the loss, phi1::linear_cross_entropy_backward, backward: result \[64, 32\] float16, largest finite "
              r"value .*; samples \[\d+, \d+\], micro-step 1, rank 0"),
    (2.0**18, r"blocks\.\d, phi1::parallel_block_backward, backward: "),
])
def test_an_overflow_in_the_backward_pass_is_named(small_corpus, engines, loss_scale, first):
    trainer = make_trainer(small_corpus, engines, "fp16", find_nonfinite=True, loss_scale=loss_scale)
    assert trainer.run_step().skipped
    assert re.search(f"first not finite: {first}", trainer.problem)


def test_a_jump_of_the_loss_is_skipped_on_request_and_its_measure_is_saved(small_corpus, engines, tmp_path):
    def losses(trainer, count):
        return [trainer.run_step() for _ in range(count)]

    straight = make_trainer(small_corpus, engines, max_loss_jump=1.2)
    losses(straight, 3)
    saved = save_checkpoint(straight, tmp_path, {}, keep=1)
    assert not straight.skipped
    resumed = make_trainer(small_corpus, engines, max_loss_jump=1.2, seed=1)
    load_checkpoint(resumed, saved)
    for trainer in (straight, resumed):
        with torch.no_grad():
            trainer.model.head.bias.to_local()[:40] += 9.0
    before = weights_of(straight)
    first = losses(straight, 2)
    assert first == losses(resumed, 2)
    assert [outcome.skipped for outcome in first] == [True, True]
    assert re.fullmatch(r"its loss is beyond \d\.\d+ \(train\.max_loss_jump\)", straight.problem)
    assert straight.cure == "a larger --train.max_loss_jump, or with --run.change train.lr=0.0033"
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(straight).items())
    assert straight.usual_loss == resumed.usual_loss > 0
    again = make_trainer(small_corpus, engines, max_loss_jump=1.2, seed=1)
    load_checkpoint(again, save_checkpoint(straight, tmp_path, {}, keep=1))
    assert again.skips == straight.skips == 2, "a run stops after max_skips of them in a row, also if it was stopped"
    straight.usual_loss = 0.0
    losses(straight, 1)
    assert (straight.skips, straight.skipped) == (0, 2)
