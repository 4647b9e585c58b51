"""Refusals of `train/pretrain.py`: one line that names the mistake and the fix, and nothing left behind."""

import fcntl
import re
import shutil
import sys

import pytest
import torch
from training_runs import FUNCTION, error_line, run, steps, train, weights

from phi1.train.data.batch_plan import BatchPlan
from phi1.train.prepare.prepare import prepare
from phi1.train.runtime.launch import Rank, RunError

MISTAKES = {  # of the command line: no run folder appears
    "unknown key": ({"train.step": 3}, "'train.step' is not a key; the nearest is train.steps"),
    "wrong value": ({"train.lr": "fast"}, "train.lr: input should be a valid number; got 'fast'"),
    "batch": ({"train.batch_size": 6, "train.micro_batch_size": 4}, "got 4; 1, 2, 3 or 6 would do"),
    "sequence": ({"data.seq_len": 513}, "data.seq_len must be at most the model's context, .* 512; got 513"),
    "vocabulary": ({"model.vocab_size": 500}, "data.vocab_size must be at most model.vocab_size, 500; got 512"),
    "warmup": ({"train.warmup_steps": 61}, "train.warmup_steps must be at most the schedule's 60 steps; got 61"),
    "no such file": ({"config": "absent.toml"}, "--config absent.toml: No such file or directory"),
    "bad TOML": ({"config": "bad.toml"}, "--config bad.toml: not valid TOML"),
    "cuda": ({"run.device": "cuda"}, "cuda is not available"),
    "corpus too small": ({"train.batch_size": 100_000}, r"train split is too small: .* 100,000 are needed"),
    "vocabulary of the corpus": ({"model.vocab_size": 300, "data.tokenizer": "data/tokenizer"},
                                 r"model.vocab_size must be at least \d+, the number of token ids in data; got 300"),
    "no source": ({"data.folder": "new", "data.source": "nowhere"}, "data.folder new: .*nowhere"),
    "other source": ({"data.source": "elsewhere"}, "data was made from .*source, not from data.source elsewhere"),
    "folder is a file": ({"run.folder": "bad.toml"}, "run.folder bad.toml: File exists"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(place, changes, message):
    if changes == MISTAKES["cuda"][0] and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    (place / "bad.toml").write_text("[train\n")
    before = sorted(place.iterdir())
    line = error_line(run(place, "refused", **changes))
    assert re.search(message, line), line
    assert sorted(place.iterdir()) == before


def test_under_torchrun_the_line_comes_once_and_is_the_root_cause(place):
    done = run(place, "refused", 2, train__batch_size=5)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("pretrain: error: ")]
    assert lines == ["pretrain: error: train.batch_size must be a multiple of the number of processes, 2; got 5; 4 or "
                     "6 would do, or 1 or 5 processes"]
    assert re.search(rf"Root Cause.*{re.escape(lines[0])}", done.stderr, re.DOTALL)
    assert "pretrain.py\", line" not in done.stderr


def test_mistakes_about_an_existing_run_are_one_line(place, uninterrupted):
    shutil.copytree(place / "whole", place / "old")
    newest = place / "old" / "checkpoints" / "step-60"

    def refused(**changes):
        return error_line(run(place, "old", **changes))

    assert re.search(r"step-60 belongs to another run: model.hidden_size was 64, is 128; train.lr was 0.003, is 0.001; "
                     r"go on with --config old/checkpoints/step-60", refused(train__lr=0.001, model__hidden_size=128))
    assert "step-60 has finished 60 steps already; got 50" in refused(train__steps=50)
    assert "there is no step-7 in old/checkpoints; there: step-40, step-60" in refused(checkpoint__resume="step-7")
    with open(place / "old" / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert re.search(r"run.folder old is in use by process \d+: wait", refused())
    (newest / "trainer.json").unlink()
    assert "step-60 is damaged: trainer.json is missing; go on from the newest that is whole" \
        in refused(checkpoint__resume="step-60")
    assert "step-60 is damaged: trainer.json is missing; it is now damaged-step-60" in train(place, "old")
    assert steps(place, "old") == steps(place, "whole")
    assert weights(place, "old") == weights(place, "whole")


def test_other_data_are_refused(place, uninterrupted):
    shutil.copytree(place / "whole", place / "fed")
    (place / "more").mkdir()
    (place / "more" / "m.py").write_text("".join(FUNCTION.format(i=i, j=0) for i in range(900)))
    shutil.copy(place / "source" / "m0.py", place / "more")
    prepare(str(place / "more"), place / "other", tokenizer=str(place / "data" / "tokenizer"), workers=1)
    line = error_line(run(place, "fed", data__folder="other", train__steps=70, data__tokenizer="data/tokenizer"))
    assert "was trained on other data than other holds now" in line


@pytest.mark.parametrize(("batch", "micro", "world"), [(8, 0, 1), (8, 2, 1), (8, 2, 2), (8, 1, 4), (8, 2, 4)])
def test_the_rows_of_all_processes_are_the_whole_batch_once(batch, micro, world):
    plans = [BatchPlan.of(batch, micro, rank, world) for rank in range(world)]
    rows = [row for plan in plans for m in range(plan.micro_steps) for row in range(batch)[plan.rows(m)]]
    assert sorted(rows) == list(range(batch))


def test_a_world_that_does_not_divide_the_batch_is_refused_with_one_that_does():
    with pytest.raises(RunError, match="must be a multiple of the number of processes, 4; got 2; 4 would do, or 1 or 2 "
                                       "processes"):
        BatchPlan.of(2, 0, 0, 4)


def test_a_rank_names_the_command_that_started_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train/pretrain.py"])
    assert Rank().command("--x 1") == "python train/pretrain.py --x 1"
    nodes = Rank(world_size=4, local_world_size=2, launcher=1)
    assert nodes.command("--x 1") == ("torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT "
                                      "--nproc-per-node 2 train/pretrain.py --x 1")
    four = Rank(world_size=4, local_world_size=4, launcher=1)
    assert four.command("--x 1") == "torchrun --standalone --nproc-per-node 4 train/pretrain.py --x 1"
