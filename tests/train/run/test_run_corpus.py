"""The corpus of a run: where it comes from, and a corpus that changes while it is opened or read."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import FUNCTION, TINY, refusal, write_files

from phi1.train import pretrain
from phi1.train.data.corpus import Corpus
from phi1.train.data.shards import read_manifest
from phi1.train.prepare.prepare import prepare
from phi1.train.recipe.file import read_recipe
from phi1.train.recipe.recipe import Recipe
from phi1.train.run import corpus as run_corpus
from phi1.train.run import start as start_module
from phi1.train.run.corpus import prepare_data
from phi1.train.run.folder import RunFolder
from phi1.train.run.start import Start
from phi1.train.runtime.launch import Rank


def recipe(**data):
    section = dataclasses.replace(Recipe().data, folder="data", vocab_size=300, workers=1, **data)
    return dataclasses.replace(Recipe(), data=section)


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
    assert said[0].startswith("warning: the corpus has changed since it was last read; what was trained on was whole: "
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
