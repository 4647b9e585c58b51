"""`train/finetune.py`, and checkpoints as models."""

import re
import shutil

import pytest
import torch
from training_runs import SCRIPT, error_line, evaluations, run, steps

from phi1 import load, load_tokenizer
from phi1.cli.main import main
from phi1.train.checkpoint.convert import read_weights
from phi1.train.checkpoint.files import checkpoints


def test_any_checkpoint_becomes_a_model(place, uninterrupted, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["convert", "--model", "whole/checkpoints/step-60", "--out", "converted"]) == 0
    converted, exported = load("converted"), load("whole/export")
    for name, tensor in exported.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name
    assert load_tokenizer("converted").fingerprint == load_tokenizer("whole/export").fingerprint
    assert main(["convert", "--model", "whole/checkpoints/step-40", "--out", "half", "--dtype", "float16"]) == 0
    assert load("half").embed.weight.dtype == torch.float16
    for name, step in (("converted", 60), ("half", 40), ("whole/export", 60)):
        assert f"step {step}\n" in (place / name / "README.md").read_text()
    card = (place / "whole" / "export" / "README.md").read_text()
    assert card == (place / "converted" / "README.md").read_text()
    assert f"{evaluations(place, 'whole')[-1]['loss']:.4f} nats a token" in card
    assert main(["convert", "--model", "whole/checkpoints/step-40", "--out", "half.gguf", "--gguf", "f16"]) == 0
    assert torch.equal(load("half.gguf").embed.weight, load("half").embed.weight)
    shutil.copytree("whole/checkpoints/step-40", "bad/checkpoints/step-40")
    (place / "bad" / "checkpoints" / "step-40" / ".metadata").write_bytes(b"x")
    assert main(["convert", "--model", "bad/checkpoints/step-40", "--out", "never"]) == 2
    assert "step-40 is damaged: .metadata has 1 bytes" in capsys.readouterr().err
    assert not (place / "never").exists()


def finetune(place, name, **changes):
    return run(place, name, script=SCRIPT.with_name("finetune.py"), data__tokenizer="data/tokenizer",
               data__source="stdlib", train__batch_size=4, train__micro_batch_size=0, **changes)


def test_finetuning_starts_from_weights_and_exports_the_best(place, uninterrupted):
    # A rate that grows and harms: the best of the evaluations is not the last.
    done = finetune(place, "tuned", model__init="whole/export", train__steps=40, train__lr=5, train__warmup_steps=40,
                    checkpoint__every=10, checkpoint__keep=1, checkpoint__keep_every=20, eval__every=10)
    assert done.returncode == 0, done.stderr
    losses = {entry["step"]: entry["loss"] for entry in evaluations(place, "tuned")}
    best = min(losses, key=losses.get)
    assert best < 40, losses
    assert f"exporting step-{best}, the best by validation: validation loss {losses[best]:.4f}; the" in done.stdout
    assert [path.name for path in checkpoints(place / "tuned" / "checkpoints")] == [
        f"step-{step}" for step in sorted({best, 20, 40})]
    assert steps(place, "tuned")[0]["loss"] < 1.2 * steps(place, "whole")[-1]["loss"]
    weights_then, _ = read_weights(place / "tuned" / "checkpoints" / f"step-{best}")
    exported = load(place / "tuned" / "export", device="cpu").state_dict()
    assert all(torch.equal(weights_then[name], tensor) for name, tensor in exported.items())


@pytest.mark.parametrize(("changes", "message"), [
    ({"model__init": "nosuch"}, "model.init nosuch: load: there is no folder nosuch"),
    ({"model__init": "whole/export", "model__intermediate_size": 64},
     "model.init whole/export is another model: its intermediate_size is 128, the run's is 64"),
    ({"model__init": "whole/export", "eval__every": 15}, "checkpoint.best needs eval.every to be a multiple of"),
])
def test_finetuning_refuses_in_one_line(place, uninterrupted, changes, message):
    line = error_line(finetune(place, "untuned", **({"eval__every": 20} | changes)), "finetune")
    assert re.search(message, line), line
