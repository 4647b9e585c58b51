"""Advice that a stopped or refused run prints: each remedy is applied as it is printed, and works."""

import re
import shlex
import shutil

import pytest
from training_runs import error_line, refusal, run, steps, train

from phi1.train.checkpoint.files import Notes, checkpoints
from phi1.train.metrics.ledger import read_ledger
from phi1.train.recipe.file import read_recipe
from phi1.train.recipe.recipe import changes


def printed(line, *options):
    """Return the options with their values as a line prints them, as keys of `run`."""
    found = {}
    for option in options:
        value = re.search(rf"--{re.escape(option)} ([^\s,;]+)", line)
        assert value, (option, line)
        found[option.replace(".", "__")] = shlex.split(value[1])[0]
    return found


def test_a_rate_that_is_too_high_is_lowered_and_the_change_is_noted(place, uninterrupted):
    shutil.copytree(place / "whole", place / "fast")
    folder = place / "fast" / "checkpoints"
    high = {"train__max_skips": 3, "train__steps": 90, "train__schedule_steps": 60}
    line = error_line(run(place, "fast", checkpoint__resume="step-40", run__change="train.lr=1e30,train.clip=0",
                          checkpoint__every=0, **high))
    assert re.search(r"the last 3 steps were skipped .* \(loss \S+, loss scale 1\); checkpoints: step-40, step-4\d; go "
                     "on with", line), line
    cure = printed(line, "run.change")
    assert cure == {"run__change": "train.lr=3.3e+29"}
    assert "from a checkpoint before the loss rose (--checkpoint.resume)" in line
    out = train(place, "fast", checkpoint__resume="step-40", run__change="train.lr=1e-3", **high)
    assert "note: train.lr was 0.003, is 0.001 from step 41 on (run.change)" in out
    assert [step["step"] for step in steps(place, "fast")] == list(range(1, 91))
    newest = Notes(checkpoints(folder)[-1])
    assert newest["defining"]["train.lr"] == 0.001
    assert newest["changes"] == [{"step": 40, "train.lr": [0.003, 0.001]}]
    assert [line["start"] for line in read_ledger(place / "fast" / "ledger.jsonl") if "start" in line][-1][
        "config"]["train"]["lr"] == 0.001
    line = error_line(run(place, "fast", train__schedule_steps=60, train__steps=95))
    assert "train.lr was 0.001, is 0.003; go on with --config fast/checkpoints/step-90" in line
    assert "train.lr may change with --run.change" in line
    line = error_line(run(place, "fast", run__change="train.lr=1e-4", run__bitwise="true", train__steps=95))
    assert "train.lr was 0.001, is 0.0001" in line


def test_a_loss_scale_at_its_floor_is_given_a_lower_one(place):
    scale = {"train__precision": "fp16", "train__loss_scale": "1e8", "train__loss_scale_floor": "1e8",
             "train__steps": 45, "checkpoint__every": 0, "eval__completions": 0}
    line = error_line(run(place, "floor", **scale))
    assert "checkpoints: step-20; go on with --run.change train.loss_scale_floor=" in line
    assert "its gradient is not finite, with the loss scale at train.loss_scale_floor, 1e+08 (loss" in line
    train(place, "floor", **scale, **printed(line, "run.change"))
    assert not steps(place, "floor")[-1]["skipped"]


def test_a_limit_of_the_loss_is_raised(place, uninterrupted):
    shutil.copytree(place / "whole", place / "jump")
    given = {"train__steps": 66, "train__max_skips": 2}
    line = error_line(run(place, "jump", train__max_loss_jump="0.1", **given))
    assert "go on with a larger --train.max_loss_jump" in line
    train(place, "jump", train__max_loss_jump=3, **given)


def test_an_edited_recipe_goes_on_with_the_checkpoint_s_own(place, uninterrupted):
    shutil.copytree(place / "whole", place / "edited")
    config = place / "edited" / "config.toml"
    config.write_text(re.sub("seed = 1", "seed = 2", config.read_text()).replace('"whole"', '"edited"'))
    only = ["pretrain.py", "--config", "edited/config.toml"]
    line = error_line(plain(place, *only[1:]))
    cure = printed(line, "config")
    assert cure == {"config": "edited/checkpoints/step-60"}
    again = plain(place, "--config", cure["config"], "--run.folder", "edited")
    assert again.returncode == 0, again.stderr
    assert "edited is complete: 60 steps" in again.stdout


def plain(place, *words):
    """Run the script with these words alone."""
    from forked_scripts import run_script
    from training_runs import SCRIPT

    return run_script(["python", str(SCRIPT), *words], place)


@pytest.mark.parametrize(("text", "told"), [
    ("train.seed=2", "with a KEY of train.lr, .*; got 'train.seed=2'"), ("train.lr", "got 'train.lr'"),
    ("train.lr=fast", "train.lr: input should be a valid number; got 'fast'")])
def test_a_change_that_cannot_be_is_one_line(text, told):
    assert re.search(told, refusal(read_recipe, None, {"run.change": text}))


def test_a_stored_change_is_older_than_the_command_line(tmp_path):
    assert changes("train.lr=1e-4, train.clip=0.5") == {"train.lr": "1e-4", "train.clip": "0.5"}
    file = tmp_path / "config.toml"
    file.write_text(read_recipe(None, {"run.change": "train.lr=1e-4", "train.lr": "1"}).to_toml())
    assert read_recipe(file, {}).train.lr == 1e-4
    assert read_recipe(file, {"train.lr": "1e-5"}).train.lr == 1e-5
