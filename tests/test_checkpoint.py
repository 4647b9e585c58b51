"""Checkpoints: what a save leaves behind, what damage is found, and that a loaded trainer is the saved one."""

import json
import math
import re
import shutil
import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from phi1.config import preset
from phi1.train import checkpoint as checkpoint_module
from phi1.train.batches import Layout
from phi1.train.checkpoint import Saver, gather_weights, load_checkpoint, save_checkpoint
from phi1.train.checkpoint_files import checkpoints, choose, find_damage, prune, remove_after
from phi1.train.data import open_corpus
from phi1.train.engine import build_model, connect_processes, start
from phi1.train.launch import Place, RunError
from phi1.train.prepare import prepare
from phi1.train.recipe import Train
from phi1.train.schedule import learning_rate
from phi1.train.step import Trainer

CONFIG = preset("nano", vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=64, rotary_dim=8, attention_dropout=0.1,
                residual_dropout=0.1)
SEQ_LEN = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    source = folder / "source"
    source.mkdir()
    for i in range(8):
        functions = (f"def add_{i}_{j}(a, b):\n    return a + b * {j}\n" for j in range(40))
        (source / f"m{i}.py").write_text("".join(functions))
    prepare(str(source), folder / "corpus", tokenizer="train", vocab_size=320, workers=1)
    return open_corpus(folder / "corpus")


@pytest.fixture(scope="module")
def engine():
    threads = torch.get_num_threads()
    place = Place()
    engines = {precision: start(place, "cpu", precision, 1) for precision in ("fp32", "fp16", "bf16")}
    connect_processes(engines["fp32"], place, HashStore())
    yield engines
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def make_trainer(corpus, engine, precision="fp32", **changes):
    train = Train(**({"steps": 20, "warmup_steps": 2, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-2} | changes))
    engine = engine[precision]
    return Trainer(build_model(CONFIG, engine, seed=1), train, SEQ_LEN, corpus, Layout.of(4, 2, 0, 1), engine)


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in gather_weights(trainer.model).items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loaded_trainer_continues_bit_for_bit(corpus, engine, precision, tmp_path):
    straight = make_trainer(corpus, engine, precision)
    outcomes = [straight.run_step() for _ in range(6)]

    first = make_trainer(corpus, engine, precision)
    assert [first.run_step() for _ in range(3)] == outcomes[:3]
    saved = save_checkpoint(first, tmp_path, {"note": "x"}, keep=2)
    second = make_trainer(corpus, engine, precision, seed=1)
    assert load_checkpoint(second, saved)["note"] == "x"
    assert [second.run_step() for _ in range(3)] == outcomes[3:]

    expected, got = weights_of(straight), weights_of(second)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_loss_falls_and_every_parameter_moves(corpus, engine):
    trainer = make_trainer(corpus, engine)
    before = weights_of(trainer)
    losses = [trainer.run_step().loss for _ in range(20)]
    assert losses[-1] < losses[0] - 0.5
    after = weights_of(trainer)
    for name in before:
        assert not torch.equal(before[name], after[name]), name


def test_accumulation_changes_nothing_but_rounding(corpus, engine):
    losses = {}
    for micro in (1, 2, 4):
        trainer = make_trainer(corpus, engine, micro_batch_size=micro)
        trainer.layout = Layout.of(4, micro, 0, 1)
        losses[micro] = torch.tensor([trainer.run_step().loss for _ in range(8)])
    assert ((losses[1] / losses[4]) - 1).abs().max() < 1e-5
    assert ((losses[2] / losses[4]) - 1).abs().max() < 1e-5


def poisoned(loss):
    """The same loss with a gradient that overflows."""
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    return lambda *args, **kwargs: Overflow.apply(loss(*args, **kwargs))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_not_finite_is_skipped_and_consumes_its_place(corpus, engine, precision, monkeypatch):
    trainer = make_trainer(corpus, engine, precision)
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


def test_fp16_finds_a_loss_scale_by_itself(corpus, engine):
    trainer = make_trainer(corpus, engine, "fp16", loss_scale=2.0**30)
    outcomes = [trainer.run_step() for _ in range(20)]
    skipped = [outcome.skipped for outcome in outcomes]
    assert skipped[0]
    first = skipped.index(False)
    assert [outcome.scale for outcome in outcomes[:first + 1]] == [2.0 ** min(30, 31 - i) for i in range(first + 1)]
    assert outcomes[-1].loss < outcomes[0].loss - 0.1


def test_clipping_bounds_the_update_by_the_global_norm(corpus, engine):
    trainer = make_trainer(corpus, engine, clip=0.01)
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


@pytest.fixture(scope="module")
def two_saved(corpus, engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    trainer = make_trainer(corpus, engine)
    for _ in range(3):
        trainer.run_step()
        save_checkpoint(trainer, folder, {}, keep=2)
    return folder


def test_the_newest_are_kept_and_the_newest_is_taken(two_saved):
    assert [path.name for path in checkpoints(two_saved)] == ["step-2", "step-3"]
    assert choose(two_saved, "auto") == two_saved / "step-3"
    assert choose(two_saved, "step-2") == two_saved / "step-2"
    assert not list(two_saved.glob(".*"))


def test_each_flipped_byte_truncation_and_loss_is_found(two_saved, tmp_path):
    intact = two_saved / "step-3"
    assert find_damage(intact) is None
    names = sorted(path.name for path in intact.iterdir())
    assert names == [".metadata", "__0_0.distcp", "manifest.json", "trainer.json"]
    for name in names:
        content = (intact / name).read_bytes()
        positions = range(0, len(content), max(1, len(content) // 7))
        damaged = [content[:i] + bytes([content[i] ^ 1]) + content[i + 1:] for i in positions]
        for case, wrong in enumerate([*damaged, content[:-1], content + b"\n", b"", None]):
            copy = tmp_path / f"{name}-{case}"
            shutil.copytree(intact, copy)
            if wrong is None:
                (copy / name).unlink()
            else:
                (copy / name).write_bytes(wrong)
            damage = find_damage(copy)
            assert damage, (name, case)
            assert damage.startswith(name)
            shutil.rmtree(copy)


def test_a_damaged_or_missing_checkpoint_is_one_line_with_the_way_out(two_saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saved, folder)
    with pytest.raises(RunError, match=r"there is no step-9 in .*checkpoints; there: step-2, step-3"):
        choose(folder, "step-9")
    (folder / "step-3" / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(RunError, match=r"step-3 is damaged: __0_0\.distcp has 5 bytes where \d+ were written; go on "
                                       r"from the newest that is whole with --checkpoint\.resume auto"):
        choose(folder, "step-3")
    lines = []
    assert choose(folder, "auto", lines.append) == folder / "step-2"
    assert re.fullmatch(rf"warning: checkpoint {folder}/step-3 is damaged: __0_0\.distcp has 5 bytes where \d+ were "
                        r"written; it is now damaged-step-3, and the run goes on from step-2", *lines)
    assert (folder / "damaged-step-3" / "__0_0.distcp").read_bytes() == b"short"
    assert remove_after(folder, folder / "step-2") == []
    (folder / "step-2" / "manifest.json").unlink()
    with pytest.raises(RunError) as error:
        choose(folder, "auto")
    assert str(error.value).endswith("step-2 is damaged: manifest.json is missing; there is no other: give another "
                                     f"--run.folder, or remove {folder} and {tmp_path / 'ledger.jsonl'} to start over")
    assert (folder / "step-2").is_dir()


def test_every_mth_checkpoint_outlives_the_newest(tmp_path):
    for step in range(1, 10):
        (tmp_path / f"step-{step}").mkdir()
    prune(tmp_path, keep=2, keep_every=4)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-4", "step-8", "step-9"]
    prune(tmp_path, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-9"]


def test_an_unfinished_save_is_never_taken_for_a_checkpoint(two_saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_saved, folder)
    (folder / "step-3").rename(folder / ".step-7.tmp")
    assert choose(folder, "auto") == folder / "step-2"
    remove_after(folder, folder / "step-2")
    assert [path.name for path in folder.iterdir()] == ["step-2"]


def test_a_disk_without_space_is_named_before_anything_is_written(corpus, engine, two_saved, tmp_path, monkeypatch):
    trainer = make_trainer(corpus, engine)
    full = shutil.disk_usage(two_saved)._replace(free=1_000_000)
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(RunError, match=r"step-0 could not be written: no disk space: it takes \d\.\d MB, 1\.0 MB "
                                       r"are free; free \d\.\d MB more, or give another --run\.folder; earlier "
                                       r"checkpoints are intact$"):
        save_checkpoint(trainer, two_saved, {}, keep=2)
    with pytest.raises(RunError, match=r"another --run\.folder$"):  # of earlier ones, where there are none, not a word
        save_checkpoint(trainer, tmp_path / "checkpoints", {}, keep=2)
    assert [path.name for path in sorted(two_saved.iterdir())] == ["step-2", "step-3"]


def test_training_goes_on_while_a_slow_disk_writes(corpus, engine, tmp_path, monkeypatch):
    write, go_on = checkpoint_module.describe, threading.Event()
    monkeypatch.setattr(checkpoint_module, "describe", lambda path: go_on.wait(60) and write(path))
    trainer = make_trainer(corpus, engine)
    trainer.run_step()
    saver = Saver(tmp_path, keep=2)
    saver.begin(trainer, {})
    before = weights_of(trainer)
    outcomes = [trainer.run_step() for _ in range(3)]
    assert saver.in_flight
    assert saver.writes()
    assert checkpoints(tmp_path) == []
    go_on.set()
    saved = saver.finish()
    assert not saver.in_flight
    assert saved.step == 1
    assert 0 < saved.stall < saved.seconds
    loaded = make_trainer(corpus, engine, seed=1)
    load_checkpoint(loaded, saved.path)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(loaded).items())
    assert [loaded.run_step() for _ in range(3)] == outcomes


def test_a_save_that_fails_midway_leaves_no_trace(corpus, engine, two_saved, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    trainer = make_trainer(corpus, engine)
    monkeypatch.setattr(checkpoint_module, "write_manifest", fail)
    with pytest.raises(RunError, match="could not be written: No space left on device; earlier checkpoints are intact"):
        save_checkpoint(trainer, two_saved, {}, keep=2)
    assert [path.name for path in sorted(two_saved.iterdir())] == ["step-2", "step-3"]


def test_the_notes_are_plain_json(two_saved):
    notes = json.loads((two_saved / "step-3" / "trainer.json").read_text())
    assert notes["step"] == 3
    assert notes["skipped"] == 0


def test_the_first_tensor_that_is_not_finite_is_named(corpus, engine):
    trainer = make_trainer(corpus, engine, find_nonfinite=True)
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


def test_an_overflow_in_the_backward_pass_is_named(corpus, engine):
    trainer = make_trainer(corpus, engine, "fp16", find_nonfinite=True, loss_scale=2.0**40)
    assert trainer.run_step().skipped
    assert re.search(r"first not finite: the loss, phi1::linear_cross_entropy_backward, backward: result \[64, 32\] "
                     r"float16, largest finite value ", trainer.problem), trainer.problem


def test_a_jump_of_the_loss_is_skipped_on_request_and_its_measure_is_saved(corpus, engine, tmp_path):
    def losses(trainer, count):
        return [trainer.run_step() for _ in range(count)]

    straight = make_trainer(corpus, engine, max_loss_jump=1.2)
    losses(straight, 3)
    saved = save_checkpoint(straight, tmp_path, {}, keep=1)
    assert not straight.skipped
    resumed = make_trainer(corpus, engine, max_loss_jump=1.2, seed=1)
    load_checkpoint(resumed, saved)
    for trainer in (straight, resumed):
        with torch.no_grad():
            trainer.model.head.bias.to_local()[:40] += 9.0
    before = weights_of(straight)
    first = losses(straight, 2)
    assert first == losses(resumed, 2)
    assert [outcome.skipped for outcome in first] == [True, True]
    assert re.fullmatch(r"its loss is beyond \d\.\d+ \(train\.max_loss_jump\)", straight.problem)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(straight).items())
    assert straight.usual_loss == resumed.usual_loss > 0
