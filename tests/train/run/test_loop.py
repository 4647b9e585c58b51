"""Evaluations and checkpoints after a step: a stop between them, and a checkpoint that cannot be written."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from training_runs import make_trainer

from phi1.train.checkpoint import checkpoint
from phi1.train.checkpoint.best import Standing
from phi1.train.checkpoint.checkpoint import Saver
from phi1.train.checkpoint.files import Notes, checkpoints
from phi1.train.evaluate.validation import Figures
from phi1.train.metrics.mfu import Mfu
from phi1.train.metrics.profiling import Profiler
from phi1.train.recipe.file import read_recipe
from phi1.train.run import loop
from phi1.train.run import run as run_module
from phi1.train.run.build import Run
from phi1.train.run.evaluation import Evaluation
from phi1.train.run.folder import RunFolder
from phi1.train.run.monitor import Monitor
from phi1.train.run.run import weights_of_best, weights_of_last
from phi1.train.run.saving import Saving
from phi1.train.run.start import Start
from phi1.train.runtime.all_ranks import Failed
from phi1.train.runtime.launch import Rank, RunError
from phi1.train.step.trainer import Outcome

RULES = {"train.steps": "6", "checkpoint.every": "1", "checkpoint.keep": "1", "eval.every": "1"}


class Scene:
    """The parts of a run with a real trainer and real checkpoints, and evaluations, HumanEval and stops as told."""

    def __init__(self, trainer, folder, losses, solved=None, stop_in=(), facts=None, saved=None, **rules):
        self.losses, self.solved, self.stop_in, self.said, self.lines = losses, solved, set(stop_in), [], []
        self.now = ""
        recipe = read_recipe(None, RULES | rules)
        steps, stops = recipe.train.steps, SimpleNamespace(agreed_to_stop=lambda *_: self.now in self.stop_in,
                                                           any_writes=False)
        trainer.train = replace(trainer.train, steps=steps)
        trainer.run_step = self.step
        note = SimpleNamespace(step=lambda *_: None, saved=lambda step, _: self.lines.append(("saved", step)),
                               evaluation=lambda step, _: self.lines.append(("eval", step)),
                               humaneval=lambda step, *_: self.lines.append(("humaneval", step)))
        progress = SimpleNamespace(say=self.said.append, tokens=1, step=lambda *_: None)
        monitor = Monitor(SimpleNamespace(report=self.report), progress, note, Mfu(1.0, 1.0, 0.0))
        humaneval = SimpleNamespace(evaluate=self.solve, write=lambda *_: None) if solved else None
        self.run = Run(
            trainer,
            Evaluation(SimpleNamespace(evaluate=self.evaluate), SimpleNamespace(), humaneval, recipe.eval,
                       recipe.checkpoint.every, steps, 0, stops, monitor),
            Saving(Saver(folder, 1), recipe.checkpoint, steps, facts or {}, monitor, saved),
            stops, monitor, Profiler(range(0), folder, self.said.append))

    def report(self, what):
        self.now = what

    def step(self):
        trainer = self.run.trainer
        trainer.finished += 1
        return Outcome(trainer.finished, 1.0, 1e-3, 1.0, 1.0, False, "")

    def evaluate(self, model, engine, rank, batch, stop):
        return None if stop() else Figures(self.losses[self.run.trainer.finished], 1.0, 1, 1)

    def solve(self, trainer, rank, stop):
        if stop():
            return None
        if self.solved == "disk":
            raise Failed("No space left on device")
        return [SimpleNamespace(task_id="a", passed=self.solved == "passed")]


LOSSES = {1: 3.0, 2: 2.0, 3: 4.0, 4: 4.0, 5: 4.0}


def test_what_a_stop_left_out_is_done_first_when_the_run_goes_on(small_corpus, engines, tmp_path):
    rules = {"checkpoint.best": "humaneval"}
    for stop, done in (("the evaluation after step 2", ["eval", "humaneval"]),
                       ("HumanEval after step 2", ["humaneval"])):
        folder, trainer = tmp_path / stop, make_trainer(small_corpus, engines)
        first = Scene(trainer, folder, LOSSES, "passed", {stop}, **rules)
        assert not loop.train(first.run)
        assert ("humaneval", 2) not in first.lines
        stored = Notes(folder / "step-2")
        assert stored["best"]["step"] == 1
        assert [path.name for path in checkpoints(folder)] == ["step-1", "step-2"]

        facts = {key: stored[key] for key in ("best", "due")}
        second = Scene(trainer, folder, LOSSES, "passed", facts=facts, saved=first.run.saving.saved, **rules)
        assert loop.train(second.run)
        assert [line for line in second.lines if line[1] == 2] == [*((what, 2) for what in done), ("saved", 2)]
        assert second.run.saving.best == Standing(2, 2.0, 1.0)
        assert "due" not in Notes(folder / "step-2")
        assert [path.name for path in checkpoints(folder)] == ["step-2", "step-6"]


def test_a_checkpoint_that_was_not_written_is_never_the_best(small_corpus, engines, tmp_path, monkeypatch):
    scene = Scene(make_trainer(small_corpus, engines), tmp_path, LOSSES, **{"checkpoint.best": "validation"})
    finish = scene.run.saving.saver.finish

    def finish_but_2():
        if scene.run.saving.saver._flying.final.name == "step-2":
            scene.run.saving.saver._flying.job.result()
            scene.run.saving.saver._flying = None
            raise RunError("no disk space")
        return finish()

    monkeypatch.setattr(scene.run.saving.saver, "finish", finish_but_2)
    assert loop.train(scene.run)
    assert "warning: no disk space; the run goes on" in scene.said
    assert scene.run.saving.best == Standing(1, 3.0)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-1", "step-6"]
    assert Notes(tmp_path / "step-6")["best"]["step"] == 1


def test_the_last_step_is_exported_if_the_best_is_gone(tmp_path, capsys):
    last = {"head.bias": torch.zeros(1)}
    assert weights_of_best(tmp_path / "step-3", last, "the best by validation: validation loss 1") is last
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.startswith(f"warning: checkpoint {tmp_path / 'step-3'} is not there; exporting")


def test_the_last_step_is_exported_if_memory_is_too_short_for_the_best(tmp_path, capsys, monkeypatch):
    def short(path):
        raise MemoryError

    last = {"head.bias": torch.zeros(1)}
    monkeypatch.setattr(run_module, "read_weights", short)
    assert weights_of_best(tmp_path / "step-3", last, "the best") is last
    assert capsys.readouterr().out == "warning: no memory; exporting the last step instead of the best\n"


def test_the_weights_are_gathered_under_the_eyes_of_the_watchdog(small_corpus, engines, tmp_path, monkeypatch):
    scene = Scene(make_trainer(small_corpus, engines), tmp_path, LOSSES)
    assert weights_of_last(scene.run)["head.bias"].shape == (320,)
    assert scene.now == "the export"

    def gather(model, take):
        raise Failed("no memory")

    monkeypatch.setattr(checkpoint, "gather", gather)
    scene.run.saving.save(scene.run.trainer)
    step = tmp_path / "step-0"
    expected = f"no memory; they are saved in {step}, which phi1 convert --model {step} --out FOLDER exports as well"
    with pytest.raises(RunError, match=f"the trained weights could not be gathered: {expected}"):
        weights_of_last(scene.run)


def test_a_run_goes_on_without_a_humaneval_that_cannot_be_run(small_corpus, engines, tmp_path):
    scene = Scene(make_trainer(small_corpus, engines), tmp_path, LOSSES | {6: 1.0}, "disk",
                  **{"checkpoint.best": "humaneval"})
    assert loop.train(scene.run)
    assert "warning: HumanEval after step 2 is missing: No space left on device; the run goes on" in scene.said
    assert scene.run.saving.best is None
    assert scene.run.evaluation.at_the_end(scene.run.trainer) == (Figures(1.0, 1.0, 1, 1), None)


def test_the_weights_are_exported_without_a_last_checkpoint(small_corpus, engines, tmp_path, monkeypatch):
    scene = Scene(make_trainer(small_corpus, engines), tmp_path / "checkpoints", LOSSES | {6: 1.0})
    begin = scene.run.saving.saver.begin

    def begin_but_6(trainer, facts):
        if trainer.finished == 6:
            raise RunError("checkpoint step-6 could not be written: no disk space")
        begin(trainer, facts)

    monkeypatch.setattr(scene.run.saving.saver, "begin", begin_but_6)
    assert loop.train(scene.run)
    exported, folder = [], RunFolder(tmp_path)
    scene.run.evaluation.held_out.text = b"x"
    scene.run.evaluation.samples.tokenizer = None
    scene.run.monitor.progress.tokens_per_s = lambda finished: 1.0
    monkeypatch.setattr(run_module, "train", lambda *_: (scene.run, (Figures(1.0, 1.0, 1, 1), None), {}))
    monkeypatch.setattr(run_module, "on_signals", lambda handler: None)
    monkeypatch.setattr(run_module.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(run_module, "export", lambda *_: exported.append(True))
    scene.run.stop_signals.reason = None
    with pytest.raises(RunError, match=r"checkpoint step-6 could not be written: no disk space; the weights of the "
                                       r"last step are in .*export; once that is mended, the same command trains from"):
        run_module.run(read_recipe(None, {}), folder, Rank(), None, Start())
    assert exported
    assert not folder.summary.exists(), "the run is not complete"
