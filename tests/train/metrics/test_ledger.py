"""A run's ledger: cutting back, its lines, TensorBoard and W&B."""

import importlib.util
import itertools
import json
import os
import sys

import pytest
from training_runs import killed_before

from phi1.train.metrics.ledger import Ledger, cut_back, read_ledger
from phi1.train.metrics.loggers import open_loggers
from phi1.train.recipe.file import read_recipe
from phi1.train.run.preflight import check_recipe
from phi1.train.runtime.launch import Rank, RunError
from phi1.train.step.trainer import Outcome


def test_the_ledger_is_cut_back_to_a_step(tmp_path):
    path = tmp_path / "ledger.jsonl"
    lines = [{"start": {"finished": 0}}, {"step": 1}, {"step": 2}, {"eval": {"step": 2}}, {"step": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cut_back(path, 2)
    assert read_ledger(path) == lines[:4]
    cut_back(path, 0)
    assert read_ledger(path) == lines[:1]
    cut_back(tmp_path / "absent.jsonl", 5)
    assert not (tmp_path / "absent.jsonl").exists()


def test_a_killed_cut_leaves_the_old_ledger_or_the_new_one(tmp_path):
    path = tmp_path / "ledger.jsonl"
    lines = [{"start": {"finished": 0}}, {"step": 1}, {"step": 2}, {"saved": 1}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3'
    for number in itertools.count():
        path.write_text(text)
        died = killed_before(number, cut_back, path, 1)
        assert path.read_text() == text or read_ledger(path) == [*lines[:2], lines[3]]
        assert cut_back(path, 1) == {("start", 0), ("step", 1), ("saved", 1)}
        assert read_ledger(path) == [*lines[:2], lines[3]]
        assert os.listdir(tmp_path) == [path.name]
        if not died:
            assert number >= 10
            return


def test_lines_that_a_resumed_run_repeats_are_noted_once(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, 0)
    ledger.step(outcome(1), {})
    ledger.evaluation(1, {"loss": 3.0})
    ledger.step(outcome(2), {})
    ledger.saved(1, {"bytes": 10})  # the write ended during step 2
    ledger.step(outcome(3), {})
    ledger.close()
    left = read_ledger(path)
    for _ in range(2):
        ledger = Ledger(path, 1)
        ledger.evaluation(1, {"loss": 3.0})
        ledger.humaneval(1, 0.5, 2)
        ledger.saved(1, {"bytes": 10})
        ledger.close()
        assert read_ledger(path) == [*left[:2], left[3], {"humaneval": {"step": 1, "pass@1": 0.5, "problems": 2}}]


FAKE_WANDB = '''
import json, os

class Run:
    def __init__(self, facts):
        self.facts, self.file = facts, os.path.join(facts["dir"], "logged.jsonl")
        self.write(facts)
    def write(self, line):
        with open(self.file, "a") as file:
            file.write(json.dumps(line) + "\\n")
    def log(self, figures, step):
        if step == 30:
            raise OSError("no space")
        self.write(figures | {"at": step})
    def finish(self):
        self.write("finished")

def init(**facts):
    if os.environ.get("WANDB_API_KEY") == "none":
        raise RuntimeError("api_key not configured (no-tty).\\nCall wandb login")
    return Run(facts)
'''


def outcome(step):
    return Outcome(step, 1.0, 0.1, 1.0, 1.0, False, "00")


def loggers(folder, finished=0, **wanted):
    return open_loggers(folder, finished, {"train": {"lr": 0.1}}, **({"tensorboard": False, "wandb": False} | wanted))


def test_a_tensorboard_that_does_not_start_or_end_is_left_out(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("phi1.train.metrics.loggers.TensorBoard.__init__", broken)
    assert loggers(tmp_path, tensorboard=True) == []
    assert capsys.readouterr().out == "warning: TensorBoard: No space left on device; it is left out\n"
    monkeypatch.setattr("phi1.train.metrics.loggers.TensorBoard.__init__", lambda *_: None)
    monkeypatch.setattr("phi1.train.metrics.loggers.TensorBoard.close", broken)
    Ledger(tmp_path / "ledger.jsonl", 0, loggers(tmp_path, tensorboard=True)).close()
    assert capsys.readouterr().out == "warning: TensorBoard: No space left on device\n"


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def test_a_start_that_is_killed_as_it_notes_the_id_of_wandb_does_not_spoil_the_next(tmp_path, monkeypatch, fake_wandb):
    def full(*_):
        raise OSError("No space left on device")

    known = tmp_path / "wandb" / "id"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(RunError, match=r"^run\.wandb: No space left on device$"):
            loggers(tmp_path, wandb=True)
    assert os.listdir(tmp_path / "wandb") == []
    known.write_text("")  # as left by an older version that wrote it in place
    for _ in range(2):
        loggers(tmp_path, wandb=True)
    first, again = [json.loads(line)["id"] for line in (tmp_path / "logged.jsonl").read_text().splitlines()]
    assert first == again == known.read_text() != ""


def test_wandb_gets_every_tenth_step_and_the_evaluations_and_the_same_run_goes_on(tmp_path, monkeypatch, capsys,
                                                                                  fake_wandb):
    folder = tmp_path / "mine"
    folder.mkdir()
    ledger = Ledger(folder / "ledger.jsonl", 0, loggers(folder, wandb=True))
    for step in range(1, 21):
        ledger.step(outcome(step), {"tokens_per_s": 9.0})
    ledger.evaluation(20, {"loss": 2.0})
    ledger.close()
    first, *lines, end = [json.loads(line) for line in (folder / "logged.jsonl").read_text().splitlines()]
    assert (first["name"], first["resume"], first["config"]) == ("mine", "allow", {"train": {"lr": 0.1}})
    assert [line["at"] for line in lines] == [10, 20, 20]
    assert lines[0] == {"at": 10, "train/loss": 1.0, "train/lr": 0.1, "train/norm": 1.0, "train/scale": 1.0,
                        "tokens_per_s": 9.0}
    assert (lines[2]["validation/loss"], end) == (2.0, "finished")

    ledger = Ledger(folder / "ledger.jsonl", 20, loggers(folder, 20, wandb=True))
    for step in range(21, 41):  # it fails at step 30, and the run goes on without it
        ledger.step(outcome(step), {"tokens_per_s": 9.0})
    ledger.close()
    again = json.loads((folder / "logged.jsonl").read_text().splitlines()[-1])
    assert again["id"] == first["id"]
    assert capsys.readouterr().out == "warning: wandb at step 30: no space; from here on it is left out\n"
    assert [line["step"] for line in read_ledger(folder / "ledger.jsonl") if "step" in line] == list(range(1, 41))

    monkeypatch.setenv("WANDB_API_KEY", "none")
    with pytest.raises(RunError, match=r"^run\.wandb: api_key not configured \(no-tty\). Call wandb login$"):
        loggers(folder, wandb=True)


def test_wandb_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"^run\.wandb needs the package wandb, which is not installed: pip install"):
        check_recipe(read_recipe(None, {"run.wandb": "true"}), Rank())
    check_recipe(read_recipe(None, {}), Rank())


def test_tensorboard_is_written_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert loggers(tmp_path, tensorboard=True) == []
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    ledger = Ledger(tmp_path / "ledger.jsonl", 0, loggers(tmp_path, tensorboard=True))
    ledger.step(outcome(10), {"tokens_per_s": 9.0})
    ledger.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_a_damaged_line_is_reported_and_costs_the_lines_after_it(tmp_path, capsys):
    path = tmp_path / "ledger.jsonl"
    lines = [json.dumps({"start": {"finished": 0}})] + [json.dumps({"step": step}) for step in range(1, 9)]
    path.write_text("\n".join([*lines[:5], lines[5].replace(":", ";"), *lines[6:]]) + "\n")
    Ledger(path, 6).close()
    assert capsys.readouterr().out == (f"warning: {path}: nothing readable after step 4; what it said of the steps up "
                                       "to 6 is lost\n")
    assert [line.get("step", 0) for line in read_ledger(path)] == [0, 1, 2, 3, 4]
    Ledger(path, 4).close()
    assert capsys.readouterr().out == ""


def test_lines_wait_while_the_disk_is_full(tmp_path):
    class Disk:
        """Takes some bytes more, then none until there is room again."""

        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, data):
            taken = min(self.room, len(data))
            if not taken:
                raise OSError(28, "No space left on device")
            self.room -= taken
            return self.file.write(bytes(data[:taken]))

        def fileno(self):
            return self.file.fileno()

        def close(self):
            self.file.close()

    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, 0)
    disk = ledger._file = Disk(ledger._file, 60)
    ledger.saved(1, {"bytes": 10})
    with pytest.raises(RunError, match=r"ledger.jsonl: cannot be written: No space left on device; its lines wait"):
        ledger.saved(2, {"bytes": 10})
    for step in range(3, 20):
        ledger.saved(step, {"bytes": 10})
    assert path.stat().st_size == 60
    disk.room = 10_000
    ledger.saved(20, {"bytes": 10})
    assert [line["saved"] for line in read_ledger(path)] == list(range(1, 21))
    disk.room = 0
    with pytest.raises(RunError):
        ledger.saved(21, {"bytes": 10})
    with pytest.raises(RunError, match="its last 1 lines could not be written"):
        ledger.close()
