"""Checkpoints of other versions of the trainer: older ones can be resumed, others are refused in one line."""

import json
import logging
import shutil
from dataclasses import asdict

import pytest
import torch
from training_runs import SMALL, make_trainer, save_checkpoint, weights_of

from phi1.train.checkpoint.checkpoint import load_checkpoint
from phi1.train.checkpoint.convert import read_weights
from phi1.train.checkpoint.files import Notes, describe, find_damage, write_manifest
from phi1.train.recipe.file import read_recipe
from phi1.train.run.folder import RunFolder
from phi1.train.run.resume import check_bitwise, check_continues, defining, notes
from phi1.train.runtime.launch import RunError

RECIPE = read_recipe(None, {})
SHAPE = {f"model.{key}": value for key, value in asdict(SMALL).items() if "dropout" not in key}


@pytest.fixture(scope="module")
def saved(small_corpus, engines, tmp_path_factory):
    """A checkpoint of two fp16 steps, and its weights."""
    trainer = make_trainer(small_corpus, engines, "fp16")
    trainer.run_step()
    trainer.run_step()
    facts = {"defining": defining(RECIPE) | SHAPE, "environment": {}, "schedule": 1250, "data": "0"}
    return save_checkpoint(trainer, tmp_path_factory.mktemp("run") / "checkpoints", facts, keep=1), weights_of(trainer)


@pytest.fixture
def older(saved, tmp_path):
    """A function that copies the checkpoint with changed notes and a new manifest."""
    def make(change):
        copy = shutil.copytree(saved[0], tmp_path / "step-2", dirs_exist_ok=True)
        said = json.loads((copy / "trainer.json").read_text())
        change(said)
        (copy / "trainer.json").write_text(json.dumps(said))
        write_manifest(copy, {path.name: describe(path) for path in copy.iterdir() if path.name != "manifest.json"})
        assert find_damage(copy) is None
        return copy
    return make


def test_notes_that_are_newer_take_their_defaults(small_corpus, engines, older, saved):
    def change(said):
        del said["usual_loss"], said["scaler"]["patience"], said["defining"]["model.rope_theta"]

    path, trainer = older(change), make_trainer(small_corpus, engines, "fp16", seed=1)
    load_checkpoint(trainer, path)
    assert (trainer.finished, trainer.usual_loss) == (2, 0.0)
    assert trainer.scaler.state_dict() == {"scale": 65536.0, "clean": 2, "patience": 2}
    logging.disable(logging.INFO)  # read_weights must leave the level as it is
    weights, config = read_weights(path)
    assert logging.root.manager.disable == logging.INFO
    logging.disable(logging.NOTSET)
    assert config.rope_theta == SMALL.rope_theta
    assert all(torch.equal(saved[1][name], tensor) for name, tensor in weights.items())
    trainer.run_step()


def test_recipe_keys_that_are_newer_had_their_defaults(older, tmp_path):
    def change(said):
        said["defining"] = defining(RECIPE)
        del said["defining"]["train.loss_scale_floor"]

    path = older(change)
    check_continues(RunFolder(tmp_path), path, Notes(path), RECIPE)
    with pytest.raises(RunError, match=r"step-2 belongs to another run: train\.loss_scale_floor was 1\.0, is 2\.0; go"):
        check_continues(RunFolder(tmp_path), path, Notes(path), read_recipe(None, {"train.loss_scale_floor": "2"}))


def test_bitwise_refuses_a_checkpoint_with_missing_records(older):
    path = older(lambda said: said.pop("usual_loss"))
    with pytest.raises(RunError, match="cannot go on bit for bit here: usual_loss was not recorded; give"):
        check_bitwise(path, Notes(path), {})
    assert list(notes(Notes(path), {"triton": "3.9.0"}, RECIPE.train, {})) == [
        "same batches and masks, but perhaps other rounding from here on: triton not recorded"]


@pytest.mark.parametrize("piece", ["scaler", "skipped"])
def test_a_missing_note_is_one_line(small_corpus, engines, older, piece):
    path = older(lambda said: said.pop(piece))
    with pytest.raises(RunError) as failure:
        load_checkpoint(make_trainer(small_corpus, engines), path)
    assert str(failure.value) == (f"checkpoint {path} was written by another version of phi1, which noted no {piece!r} "
                                  "in trainer.json; go on with that version, or begin another --run.folder")


@pytest.mark.parametrize(("change", "line"), [
    (lambda said: said.pop("defining"), "step-2 was written by another version of phi1, which noted no 'defining' in"),
    (lambda said: said["defining"].update({"model.experts": 8}), "step-2: this version of phi1 has no such model: .*"
                                                                 "'experts'"),
    (lambda said: said["defining"].update({"model.num_hidden_layers": 3}), r"step-2 cannot be loaded: .*blocks\.2\."),
])
def test_an_unknown_model_is_not_converted(older, change, line):
    with pytest.raises(RunError, match=line) as failure:
        read_weights(older(change))
    assert "\n" not in str(failure.value)
