"""Refusals before a run starts, and the checkpoint that a run resumes from; no process is started."""

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore
from training_runs import FUNCTION, TINY, write_files

from phi1 import Phi1, save
from phi1.train import pretrain
from phi1.train.checkpoint.files import describe, write_manifest
from phi1.train.data.corpus import Corpus
from phi1.train.data.shards import DataError, read_manifest
from phi1.train.metrics.ledger import cut_back, has_saved, read_ledger
from phi1.train.prepare.prepare import prepare
from phi1.train.prepare.workspace import workspace
from phi1.train.recipe.file import read_recipe
from phi1.train.recipe.recipe import Model, Recipe, Train
from phi1.train.run import corpus as run_corpus
from phi1.train.run import preflight
from phi1.train.run import start as start_module
from phi1.train.run.corpus import prepare_data
from phi1.train.run.folder import RunFolder
from phi1.train.run.preflight import check_untrained
from phi1.train.run.start import Start
from phi1.train.runtime.launch import Rank, RunError, announce


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with a source in src/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    for name in "ab":
        (tmp_path / "src" / f"{name}.py").write_text(f"{name} = 1\n")
    return tmp_path


def replaced(section, **values):
    return dataclasses.replace(Recipe(), **{section: dataclasses.replace(getattr(Recipe(), section), **values)})


def recipe(**data):
    return replaced("data", folder="data", vocab_size=300, workers=1, **data)


def refusal(action, *args):
    with pytest.raises(RunError) as error:
        action(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("left", ["ledger.jsonl", "summary.json", "export"])
def test_a_trained_run_without_checkpoints_is_not_begun_anew(tmp_path, left):
    folder = RunFolder(tmp_path / "run")
    check_untrained(folder)
    folder.path.mkdir()
    (folder.path / left).write_text('{"start": {}}\n{"step": 1}\n{"saved": 1}\n')
    assert refusal(check_untrained, folder) == (
        f"run.folder {folder.path}: it was trained before, but no checkpoint is left in {folder.checkpoints} to go on "
        f"from; give another --run.folder, or remove {folder.path / left} to start over")


def test_a_run_killed_before_its_first_checkpoint_may_begin_anew(tmp_path):
    folder = RunFolder(tmp_path)
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


def test_a_source_is_the_same_by_any_name_of_its_folder(here):
    (here / "data").mkdir()  # an empty folder is filled
    for source in ("src", "./src/", str(here / "src"), "src/../src"):
        prepare_data(recipe(source=source))
    (here / "other").mkdir()
    for source in ("other", "nowhere"):
        assert refusal(prepare_data, recipe(source=source)) == (
            f"data.folder data was made from src, not from data.source {source}; give another --data.folder for it")


@pytest.fixture(scope="module")
def other_corpus(place, tmp_path_factory):
    source = write_files(tmp_path_factory.mktemp("source"), {
        f"z{i}.py": "".join(FUNCTION.format(i=i, j=j) for j in range(40)) for i in range(9)})
    out = tmp_path_factory.mktemp("other") / "data"
    prepare(str(source), out, tokenizer=str(place / "data" / "tokenizer"), val_fraction=0.2, workers=1)
    return out


@pytest.fixture
def two_corpora(place, here, other_corpus):
    """The recipe of a run on data/, and a function that replaces that corpus with another."""
    shutil.copytree(place / "data", "data")
    shutil.copytree(other_corpus, "other")

    def swap():
        os.rename("data", "old")
        os.rename("other", "data")

    return read_recipe(None, {key: str(value) for key, value in TINY.items()}), swap


@pytest.mark.parametrize("verified", [True, False])
@pytest.mark.parametrize("moment", range(4))
def test_a_corpus_that_takes_anothers_place_while_it_is_opened_is_refused(two_corpora, monkeypatch, verified, moment):
    given, swap = two_corpora
    one, other = (read_manifest(Path(name))["fingerprint"] for name in ("data", "other"))
    calls = []

    def counted(call):
        def swap_before(*args, **options):
            calls.append(call)
            if len(calls) == moment + 1:
                swap()
            return call(*args, **options)
        return swap_before

    monkeypatch.setattr(run_corpus, "open_corpus", counted(run_corpus.open_corpus))
    monkeypatch.setattr(Corpus, "load_tokenizer", counted(Corpus.load_tokenizer))
    monkeypatch.setattr(run_corpus, "read_manifest", counted(run_corpus.read_manifest))
    if moment == 0 and not verified:
        assert run_corpus.open_data(given)[0].fingerprint == other
    else:
        assert refusal(run_corpus.open_data, given, one if verified else None) == (
            f"data.folder data: another corpus has taken its place since the run began (fingerprint {one[:12]}, now "
            f"{other[:12]}); give the same command again")
    assert len(calls) == 4


@pytest.mark.parametrize("prove", [{}, {"run.prove_resume": "3"}])
def test_every_process_opens_the_corpus_that_rank_0_has_read(two_corpora, tmp_path, monkeypatch, prove):
    monkeypatch.setattr(pretrain, "on_signals", lambda *_: None)
    for name, checkpoints in (("start_run", ("step-1",)), ("start_replay", ("step-1", "step-2"))):
        monkeypatch.setattr(start_module, name, lambda *_, found=checkpoints: Start("0" * 64, found))
    given = read_recipe(None, {key: str(value) for key, value in TINY.items()} | prove)
    try:
        line = refusal(pretrain.start_or_resume, given, RunFolder(tmp_path), Rank())
    finally:
        torch.distributed.destroy_process_group()
    assert "another corpus has taken its place since the run began (fingerprint 000000000000, now" in line


def test_a_corpus_that_changes_while_it_is_trained_on_is_named_at_the_end(place, here, engines):
    shutil.copytree(place / "data", "data")
    given, said = read_recipe(None, {key: str(value) for key, value in TINY.items()}), []
    fingerprint = read_manifest(Path("data"))["fingerprint"]
    run_corpus.read_again(given, fingerprint, Rank(), said.append)
    assert said == []
    shard = Path("data/train-00000.bin")
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    run_corpus.read_again(given, fingerprint, Rank(1, 2, 1, 2), said.append)
    assert said == [], "another process of this machine reads"
    run_corpus.read_again(given, fingerprint, Rank(), said.append)
    assert len(said) == 1
    assert said[0].startswith("warning: the corpus has changed since the run began, and may have been read like that: "
                              "data/train-00000.bin: damaged: its content hash is wrong: block ")


AGAIN = "phi1 prepare --source src --tokenizer train --vocab-size 300 --out data --force"


def test_a_data_folder_that_holds_no_corpus_is_named_once_with_the_command_that_fits(here):
    (here / "data").mkdir()
    (here / "data" / "tokenizer").mkdir()
    assert refusal(prepare_data, recipe(source="src")) == (
        "data.folder data: it is there, but holds no corpus (no manifest.json); give another --data.folder, or make "
        f"the corpus with: {AGAIN}")


def test_a_damaged_manifest_is_one_line_with_the_command_that_fits(here):
    prepare("src", "data", tokenizer="train", vocab_size=300, workers=1)
    for content in ("{}", "[]", "{", '"text"', '{"format": "phi1-corpus", "version": 1}'):
        (here / "data" / "manifest.json").write_text(content)
        assert refusal(prepare_data, recipe(source="src")) == (
            "data.folder: data/manifest.json: damaged: it is no corpus' manifest any more; restore it or prepare the "
            f"corpus again with: {AGAIN}"), content


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
