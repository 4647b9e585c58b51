"""Completions and HumanEval during training; neither changes a bit of the run."""

import json
import tempfile
from types import SimpleNamespace

import pytest
import torch
from training_runs import steps, train, weights

from phi1 import Phi1, preset
from phi1.evaluate.humaneval import Attempt, Problem
from phi1.tokenizer import train_bpe
from phi1.train.checkpoint.best import Standing
from phi1.train.evaluate import humaneval, samples
from phi1.train.metrics.ledger import read_ledger
from phi1.train.recipe.file import read_recipe
from phi1.train.run.preflight import check_recipe
from phi1.train.runtime.all_ranks import Failed
from phi1.train.runtime.launch import Rank, RunError


def test_completions_are_written_and_change_no_bit(place, uninterrupted):
    train(place, "sampled", eval__completions_every=20, eval__completions=2)
    assert sorted(path.name for path in (place / "sampled" / "samples").iterdir()) == ["step-20.md", "step-40.md"]
    early, late = ((place / "sampled" / "samples" / f"step-{step}.md").read_text() for step in (20, 40))
    assert early.startswith("# Step 20\n\nTemperature 0.7, seed 1.\n\n```python\ndef scale_")
    headers = [line for line in early.split("\n") if line.startswith("def ")]
    assert len(headers) == 2
    assert [line for line in late.split("\n") if line.startswith("def ")] == headers
    assert early.replace("20", "40") != late
    assert steps(place, "sampled") == steps(place, "whole")
    assert weights(place, "sampled") == weights(place, "whole")


def problems():
    """Yield twenty problems, more than one batch. In every other one the completion becomes part of a string."""
    for i in range(20):
        prompt, test = f"def f{i}(x):\n    return x\n", f"def check(candidate):\n    assert candidate({i}) == {i}\n"
        if i % 2:
            yield {"task_id": f"Own/{i}", "prompt": f"{prompt}_ = r'''\n", "test": f"'''\n{test}"}
        else:
            yield {"task_id": f"Own/{i}", "prompt": prompt, "test": f"{test}    raise NotImplementedError\n"}


def test_two_processes_write_and_solve_together_and_keep_their_bits(place, uninterrupted_pair):
    (place / "own.jsonl").write_text("".join(json.dumps(
        problem | {"entry_point": f"f{i}", "canonical_solution": ""}) + "\n" for i, problem in enumerate(problems())))
    out = train(place, "pair-sampled", 2, eval__completions_every=30, eval__every=30, checkpoint__every=30,
                checkpoint__best="humaneval", eval__humaneval="own.jsonl", eval__execute="true", eval__timeout=60)
    assert sorted(path.name for path in (place / "pair-sampled" / "samples").iterdir()) == [
        "humaneval-30.jsonl", "humaneval-60.jsonl", "step-30.md"]
    assert steps(place, "pair-sampled") == steps(place, "pair")
    assert weights(place, "pair-sampled") == weights(place, "pair")

    written = (place / "pair-sampled" / "samples" / "humaneval-60.jsonl").read_text()
    results = [json.loads(line) for line in written.splitlines()]
    assert [line["task_id"] for line in results] == [f"Own/{i}" for i in range(20)]
    assert [line["passed"] for line in results] == [bool(i % 2) for i in range(20)]
    noted = [line["humaneval"] for line in read_ledger(place / "pair-sampled" / "ledger.jsonl") if "humaneval" in line]
    assert noted == [{"step": step, "pass@1": 0.5, "problems": 20} for step in (30, 60)]
    assert "step 30: HumanEval pass@1 50.0 % of 20 problems" in out
    assert "HumanEval        pass@1 50.0 %\n" in out


def test_no_process_dies_of_a_system_that_runs_no_programs(engines, monkeypatch, tmp_path):
    own = [Problem(entry["task_id"], entry["prompt"], f"f{i}", "", entry["test"]) for i, entry in enumerate(problems())]
    monkeypatch.setattr(humaneval, "whole_model", lambda *_: "model")
    monkeypatch.setattr(humaneval, "complete", lambda model, tokenizer, some: [Attempt(p.task_id, "") for p in some])
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    evaluation, asked = humaneval.HumanEval(tmp_path, None, own, 1.0), []
    trainer = SimpleNamespace(model=None, engine=engines["fp32"])
    with pytest.raises(Failed, match=r"^not run: OSError: \[Errno 28\] No space left on device$"):
        evaluation.evaluate(trainer, 0, lambda: asked.append(1))
    assert len(asked) == 2  # as often as where all goes well


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_the_best_step_is_that_of_the_rule():
    first, better, solves = Standing(1, 2.0, 0.1), Standing(2, 1.5, 0.1), Standing(3, 2.5, 0.2)
    assert first.beats(None, "validation")
    assert better.beats(first, "validation")
    assert better.beats(first, "humaneval")
    assert not solves.beats(better, "validation")
    assert solves.beats(better, "humaneval")
    assert not first.beats(Standing(4, 2.0, 0.1), "humaneval")
    assert first.beats(Standing(5, float("nan"), 0.1), "humaneval")
    assert not Standing(5, float("nan"), 0.1).beats(first, "validation")
    assert str(solves) == "validation loss 2.5000, pass@1 20.0 %"


@pytest.mark.parametrize(("changes", "message"), [
    ({"eval.humaneval": "own.jsonl"}, "runs programs that the model writes .* --eval.execute true consents to it"),
    ({"eval.humaneval": "nosuch.jsonl", "eval.execute": "true"}, "eval.humaneval nosuch.jsonl: No such file"),
    ({"checkpoint.best": "humaneval"}, "needs eval.every to be a multiple of checkpoint.every"),
    ({"checkpoint.best": "humaneval", "eval.every": "500"}, "humaneval needs eval.humaneval, a file of problems"),
    ({"checkpoint.best": "loss"}, "checkpoint.best: input should be 'validation' or 'humaneval'; got 'loss'"),
])
def test_what_humaneval_needs_is_refused_in_one_line(changes, message):
    with pytest.raises(RunError, match=message) as refused:
        check_recipe(read_recipe(None, changes), Rank())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("trouble", ["nan", "memory", "disk"])
def test_completions_that_fail_are_one_line_for_the_run_to_go_on_with(tmp_path, monkeypatch, trouble):
    model, tokenizer = Phi1(preset("nano", vocab_size=300, num_hidden_layers=1)), train_bpe(["def f(x):\n"] * 9, 300)
    if trouble == "nan":
        torch.nn.init.constant_(model.head.bias, float("nan"))
    elif trouble == "memory":
        monkeypatch.setattr(samples, "complete", lambda *_: (_ for _ in ()).throw(MemoryError("no memory")))
    else:
        (tmp_path / "samples").write_text("in the way")
    monkeypatch.setattr(samples, "whole_model", lambda *args, here: model if here else None)
    trainer = SimpleNamespace(model=model, engine=None, finished=3)
    writer = samples.Samples(tmp_path / "samples", tokenizer, ["def f(x):\n"], seed=1)
    reason = {"nan": "generate: the model's logits hold nan", "memory": "no memory",
              "disk": ".*File exists"}[trouble]
    with pytest.raises(RunError, match=f"^the completions of step 3 are missing: {reason}"):
        writer.write(trainer, rank=0)
    writer.write(trainer, rank=1)
    samples.Samples(tmp_path / "none", tokenizer, [], seed=1).write(trainer, rank=0)
    assert not (tmp_path / "none").exists()


def test_headers_with_a_docstring_come_first_and_are_spread():
    text = "".join(f'def f{i}(x):\n    """Return what belongs to {i}."""\n    return x\n\ndef g{i}(x):\n    pass\n\n'
                   for i in range(9)).encode()
    assert [header.split("(")[0] for header in samples.function_headers(text, 3)] == ["def f0", "def f3", "def f6"]
    assert [header.split("(")[0] for header in samples.function_headers(text, 11)][9:] == ["def g0", "def g4"]
    assert samples.function_headers(b"x = 1\n", 3) == []
