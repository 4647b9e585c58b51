"""Recipes: files, overrides, and one line for each mistake."""

import dataclasses
import re
import subprocess
import sys
import tomllib

import pytest

from phi1.config import PRESETS
from phi1.train.recipe.file import DEFAULT_FILE, help_text, read_recipe
from phi1.train.recipe.recipe import KEYS, Recipe
from phi1.train.runtime.launch import RunError


def test_the_nano_file_spells_out_the_defaults():
    assert read_recipe(DEFAULT_FILE, {}) == Recipe() == read_recipe(None, {})


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('[train]\nsteps = 7\nlr = 1e-4\nbetas = [0.8, 0.99]\n[run]\nfolder = "runs/seven"\n')
    recipe = read_recipe(file, {"train.steps": "9", "run.folder": "007", "model.hidden_size": "128",
                                "run.tensorboard": "false", "train.min_lr": "0", "train.betas": "[0.7, 0.9]"})
    assert recipe.train.steps == 9
    assert recipe.train.lr == 1e-4
    assert recipe.train.betas == (0.7, 0.9)
    assert recipe.run.folder == "007"
    assert recipe.run.tensorboard is False
    assert recipe.train.warmup_steps == Recipe().train.warmup_steps
    assert recipe.phi1_config().hidden_size == 128
    assert recipe.phi1_config().intermediate_size == PRESETS["nano"].intermediate_size
    config = read_recipe(None, {"train.dropout": "0.1"}).phi1_config()
    assert (config.attention_dropout, config.residual_dropout) == (0.1, 0.1)


def test_the_stored_form_reads_back_as_the_same_recipe(tmp_path):
    recipe = read_recipe(None, {"model.vocab_size": "512", "train.lr": "1e-3", "run.folder": 'odd "name" \\ é'})
    (tmp_path / "config.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(tmp_path / "config.toml", {}) == recipe


@pytest.mark.parametrize(("key", "nearest"), [
    ("train.step", "train.steps"),
    ("steps", "train.steps"),
    ("batch-size", "train.batch_size"),
    ("modle.preset", "model.preset"),
    ("trian.lr", "train.lr"),
    ("checkpoint.evry", "checkpoint.every"),
])
def test_an_unknown_key_is_named_with_the_nearest_known_one(key, nearest, tmp_path):
    with pytest.raises(RunError, match=f"{re.escape(repr(key))} is not a key; the nearest is {re.escape(nearest)} "):
        read_recipe(None, {key: "3"})
    file = tmp_path / "wrong.toml"
    section, _, leaf = key.rpartition(".")
    file.write_text(f"[{section}]\n{leaf} = 3\n" if section else f"{leaf} = 3\n")
    with pytest.raises(RunError, match=rf"wrong\.toml: {re.escape(repr(key))} .* nearest is {re.escape(nearest)} "):
        read_recipe(file, {})


@pytest.mark.parametrize(("key", "text", "message"), [
    ("train.steps", "0", "train.steps: input should be greater than or equal to 1; got 0"),
    ("train.steps", "abc", "train.steps: input should be a valid integer; got 'abc'"),
    ("train.steps", "1.5", "train.steps: input should be a valid integer; got 1.5"),
    ("train.steps", "true", "train.steps: input should be a valid integer; got True"),
    ("train.lr", "inf", "train.lr: input should be .*finite.*; got inf"),
    ("train.lr", "nan", "train.lr: input should be .*; got nan"),
    ("train.betas", "[0.9, 1.0]", r"train.betas\[1\]: input should be less than 1; got \[0.9, 1.0\]"),
    ("train.betas", "0.9", r"train.betas: input should be of the form \[0.9, 0.95\]; got 0.9"),
    ("train.betas", "[0.9]", r"train.betas\[1\]: input should be of the form \[0.9, 0.95\]; got \[0.9\]"),
    ("train.betas", "[0.9, 0.9, 0.9]", r"train.betas: input should be of the form \[0.9, 0.95\]; got \[0.9, 0"),
    ("train.precision", "fp8", "train.precision: input should be 'auto', 'fp16', 'bf16' or 'fp32'; got 'fp8'"),
    ("run.tensorboard", "maybe", "run.tensorboard: input should be true or false; got 'maybe'"),
    ("run.tensorboard", "False", "run.tensorboard: input should be true or false; got 'False'"),
    ("run.folder", "", "run.folder: string should have at least 1 character; got ''"),
    ("data.folder", "", "data.folder: string should have at least 1 character; got ''"),
    ("model.preset", "phi9", "preset: name must be one of phi1, .*; got 'phi9'"),
    ("model.hidden_size", "250", r"hidden_size must be a multiple of num_attention_heads \(4\); got 250"),
])
def test_a_wrong_value_is_named_with_its_rule(key, text, message):
    with pytest.raises(RunError, match=message):
        read_recipe(None, {key: text}).phi1_config()


@pytest.mark.parametrize(("content", "message"), [
    (None, r"absent\.toml: No such file"),
    (b"[train\nsteps = 1\n", r"absent\.toml: not valid TOML: .*line 1"),
    (b"[train]\n# \xff\n", r"absent\.toml: not UTF-8"),
    (b"train = 3\n", r"absent\.toml: train must be a section, a line \[train\] with the keys below it; got 3"),
    (b"[[train]]\nsteps = 3\n", r"absent\.toml: train must be a section, a line \[train\] .*; got \[\{'steps': 3\}\]"),
    (b"tarin = 3\n", r"absent\.toml: 'tarin' is not a key"),
    (b'[train]\nsteps = "12"\n', r"absent\.toml: train\.steps: input should be a valid integer; got '12'"),
])
def test_a_wrong_file_is_one_line_with_its_name(content, message, tmp_path):
    file = tmp_path / "absent.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RunError, match=message) as error:
        read_recipe(file, {})
    assert "\n" not in str(error.value)


def test_help_lists_every_key_with_its_default():
    shown = help_text()
    for key in KEYS:
        assert len(re.findall(rf"^  --{re.escape(key)}  \S", shown, re.MULTILINE)) == 1
    assert re.search(r"--train\.steps  .*\(default 1250\)$", shown, re.MULTILINE)
    assert re.search(r"--train\.betas  .*\(default \[0\.9, 0\.95\]\)$", shown, re.MULTILINE)


def test_recipes_are_frozen_and_hold_toml_types_alone():
    recipe = Recipe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.train.steps = 3
    parsed = tomllib.loads(recipe.to_toml())
    assert set(parsed) == {"model", "data", "train", "checkpoint", "eval", "run"}


PAPER = {  # arXiv 2306.11644, section 2.3; schedule_steps: 36,000 although phi-1-base is the checkpoint after 24,000
    "phi1-base": {"steps": 24_000, "schedule_steps": 36_000, "batch_size": 1024, "lr": 1e-3, "warmup_steps": 750,
                  "weight_decay": 0.1, "dropout": 0.1, "precision": "fp16"},
    "phi1": {"steps": 6_000, "schedule_steps": 0, "batch_size": 256, "lr": 1e-4, "warmup_steps": 50,
             "weight_decay": 0.01, "dropout": 0.1, "precision": "fp16"},
    "phi1-small": {"steps": 36_000, "schedule_steps": 36_000, "batch_size": 1024, "lr": 1e-3, "warmup_steps": 750,
                   "weight_decay": 0.1, "dropout": 0.1, "precision": "fp16"},
}
OPEN = ("betas", "eps", "clip", "min_lr", "loss_scale", "micro_batch_size")


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_have_its_numbers_and_mark_what_was_chosen(name):
    file = DEFAULT_FILE.with_name(f"{name}.toml")
    recipe = read_recipe(file, {})
    assert {key: getattr(recipe.train, key) for key in PAPER[name]} == PAPER[name]
    assert recipe.data.seq_len == 2048
    assert recipe.data.tokenizer == "microsoft/phi-1"
    chosen = {line.split(" = ")[0] for line in file.read_text().splitlines() if "# chosen" in line}
    assert chosen.issuperset(OPEN)
    assert chosen.isdisjoint(PAPER[name])
    if name == "phi1":
        assert (recipe.checkpoint.best, recipe.checkpoint.every, recipe.eval.every) == ("validation", 1000, 1000)


def test_the_rate_where_phi_1_base_was_taken():
    from phi1.train.step.schedule import learning_rate

    train = read_recipe(DEFAULT_FILE.with_name("phi1-base.toml"), {}).train
    assert learning_rate(749, train) == pytest.approx(1e-3)
    assert learning_rate(24_000, train) == pytest.approx(1e-3 * 12_000 / 35_250)


def test_a_recipe_needs_no_package_until_it_is_read_or_written():
    """A training step takes a recipe also on machines that have only PyTorch."""
    code = ("import sys; sys.modules.update(dict.fromkeys(('pydantic', 'tomli_w', 'xxhash', 'datasets')))\n"
            "import phi1.train.data.corpus\n"
            "from phi1.train.recipe.recipe import KEYS, Train; Train(); print(len(KEYS))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{len(KEYS)}\n", done.stderr
