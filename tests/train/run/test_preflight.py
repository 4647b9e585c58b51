"""Refusals before a run starts, and the checkpoint that a run resumes from; no process is started."""

import dataclasses
import json
import os
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore
from training_runs import refusal, write_files

from phi1 import Phi1, save
from phi1.train.checkpoint.files import describe, write_manifest
from phi1.train.data.shards import DataError
from phi1.train.metrics.ledger import cut_back, has_saved, read_ledger
from phi1.train.prepare.workspace import workspace
from phi1.train.recipe.file import read_recipe
from phi1.train.recipe.recipe import Model, Recipe, Train
from phi1.train.run import preflight
from phi1.train.run import start as start_module
from phi1.train.run.folder import RunFolder
from phi1.train.run.preflight import check_untrained
from phi1.train.run.start import Start
from phi1.train.runtime.launch import Rank, RunError, announce


def replaced(section, **values):
    return dataclasses.replace(Recipe(), **{section: dataclasses.replace(getattr(Recipe(), section), **values)})


@pytest.mark.parametrize("left", ["ledger.jsonl", "summary.json", "export"])
def test_a_trained_run_without_checkpoints_is_not_begun_anew(tmp_path, left):
    folder = RunFolder(tmp_path / "run")
    check_untrained(folder)
    folder.path.mkdir()
    (folder.path / left).write_text('{"start": {}}\n{"step": 1}\n{"saved": 1}\n')
    assert refusal(check_untrained, folder) == (
        f"run.folder {folder.path}: it was trained before, but no checkpoint is left in {folder.checkpoints} to go on "
        f"from; give another --run.folder, or remove {folder.path / left} to start over")


@pytest.mark.parametrize("exported", [False, True])
def test_a_run_that_never_saved_a_checkpoint_may_begin_anew(tmp_path, exported):
    folder = RunFolder(tmp_path)
    if exported:
        folder.export.mkdir()
    folder.ledger.write_text('{"start": {}}\n{"step": 1}\n{"sav')
    check_untrained(folder)


def test_a_ledger_keeps_the_note_of_the_checkpoint_that_it_is_cut_back_to(tmp_path):
    path = tmp_path / "ledger.jsonl"
    lines = [{"start": {"finished": 0}}, {"step": 1}, {"saved": 1}, {"step": 2}, {"saved": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cut_back(path, 1)
    assert read_ledger(path) == lines[:3]
    assert has_saved(path)
    cut_back(path, 0)
    assert not has_saved(path)


def test_a_ledger_is_read_without_the_line_that_a_kill_cut_short(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_ledger(path) == [{"step": 1}]
    path.write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1"):
        read_ledger(path)


@pytest.fixture
def admitted(tmp_path, monkeypatch):
    """A function that starts one attempt of a launch, with the checkpoints step-10 to step-40 at first."""
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (10, 20, 30, 40):
        path = write_files(checkpoints / f"step-{step}", {"trainer.json": json.dumps({"step": step, "data": "0"})})
        write_manifest(path, {"trainer.json": describe(path / "trainer.json")})
    for name in ("check_continues", "start_engine", "environment_of", "prepare_data"):
        monkeypatch.setattr(start_module, name, lambda *_: None)
    monkeypatch.setattr(start_module, "open_data", lambda *_: (SimpleNamespace(fingerprint="0"), None, None))

    def attempt(number, resume="step-20", launch="a"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        folder = RunFolder(tmp_path / "run")
        try:
            return start_module.start_run(replaced("checkpoint", resume=resume), folder, Rank(attempt=number))
        finally:
            os.close(folder._lock)

    attempt.checkpoints = checkpoints
    return attempt


def test_an_older_checkpoint_is_resumed_once(admitted, capsys):
    assert admitted(0) == Start("0", ("step-20",))
    assert [path.name for path in sorted(admitted.checkpoints.iterdir())] == ["step-10", "step-20"]
    shutil.copytree(admitted.checkpoints / "step-20", admitted.checkpoints / "step-30")  # the run goes on
    capsys.readouterr()
    for number in (1, 2):
        assert admitted(number) == Start("0", ("step-30",))
        assert capsys.readouterr().out == ("note: torchrun has restarted the run, which goes on from its newest "
                                           "checkpoint; step-20 was where it began\n")
    assert read_recipe(admitted.checkpoints.parent / "config.toml", {}) == Recipe()


def test_every_process_reads_the_start_that_rank_0_has_announced():
    for given in (Start("a b", ("step-1", "step-2")), Start(complete=True)):
        store = HashStore()
        assert Start.from_json(announce(store, Rank(0, 2), given.to_json())) == given
        before = signal.getsignal(signal.SIGINT)
        try:
            assert Start.from_json(announce(store, Rank(1, 2), "")) == given
        finally:
            signal.signal(signal.SIGINT, before)


def test_what_an_earlier_launch_noted_says_nothing_of_one_whose_first_attempt_noted_nothing(admitted):
    assert admitted(0, "step-30", launch="b") == Start("0", ("step-30",))
    assert admitted(1) == Start("0", ("step-20",))


@pytest.mark.parametrize("dies_in", ["choose", "prepare_data", "remove_after"])
@pytest.mark.parametrize("earlier", [None, "a", "b"])
def test_a_restart_goes_back_where_the_attempt_before_did_not_come_so_far(admitted, monkeypatch, dies_in, earlier):
    def dies(*_):
        raise RunError("killed")

    if earlier:  # another launch, perhaps of the same name, that has gone back as well
        assert admitted(0, "step-30", launch=earlier) == Start("0", ("step-30",))
    with monkeypatch.context() as patch:
        patch.setattr(start_module, dies_in, dies)
        assert refusal(admitted, 0) == "killed"
    for number in (1, 2):
        assert admitted(number) == Start("0", ("step-20",))


def test_weights_to_start_from_are_of_the_runs_model(tmp_path):
    config = Recipe().phi1_config()
    save(Phi1(dataclasses.replace(config, num_hidden_layers=1, max_position_embeddings=64)), tmp_path / "init")
    layers = {"num_hidden_layers": 1, "hidden_size": 256}
    shaped = dataclasses.replace(Recipe(), model=Model(init=str(tmp_path / "init"), **layers))
    preflight.check_init(Recipe())
    preflight.check_init(shaped)
    other = dataclasses.replace(shaped, model=dataclasses.replace(shaped.model, num_attention_heads=8))
    assert refusal(preflight.check_init, other) == (
        f"model.init {tmp_path}/init is another model: its num_attention_heads is 4, the run's is 8")
    nowhere = dataclasses.replace(shaped, model=Model(init=f"{tmp_path}/nowhere"))
    assert refusal(preflight.check_init, nowhere) == (
        f"model.init {tmp_path}/nowhere: load: there is no folder {tmp_path}/nowhere")


def test_a_folder_that_cannot_be_written_is_not_called_full(here):
    (here / "file").write_text("")
    for out, reason in (("/proc/x", "No such file or directory"), ("file/x", "File exists")):
        folder = here / out
        message = f"nothing can be written in {folder.parent}: {reason}; choose another place"
        with pytest.raises(DataError, match=f"^{re.escape(message)}$"), workspace(folder, 0):
            pass


def test_a_recipe_that_cannot_be_kept_is_one_line(tmp_path):
    folder = RunFolder(tmp_path)
    folder.store(Recipe().to_toml())
    (tmp_path / "config.tmp").mkdir()
    folder.store(Recipe().to_toml())  # says nothing new
    line = refusal(folder.store, Recipe(train=Train(steps=7)).to_toml())
    assert line == f"{tmp_path / 'config.toml'} cannot be written: Is a directory"
