"""bench/gpu/train_sweep.py with a pretended trainer: growing sizes, memory that runs out, the result."""

import json
import sys
import time

import pytest
import torch

from phi1.bench.gpu import train_sweep
from phi1.bench.gpu.train_sweep import FULL, STEPS, TINY, fastest, measure, result, sweep
from phi1.gpus import GPUS
from phi1.train.plan.measured import measured_mfu

TRAINER = """
import json, pathlib, sys, time
given = dict(word[2:].split("=", 1) for word in sys.argv[1:])
size, dropout = int(given["train.micro_batch_size"]), float(given["train.dropout"])
if size > {largest}:
    sys.exit("pretrain: error: out of memory: a smaller micro-batch would do")
folder = pathlib.Path(given["run.folder"])
folder.mkdir(parents=True)
with open(folder / "ledger.jsonl", "w", buffering=1) as ledger:
    ledger.write('{{"start": {{}}}}\\n')
    for step in range(1, {steps} + 1):
        speed = 1 if step < 3 else (100 - 20 * (dropout > 0)) * size
        ledger.write(json.dumps({{"step": step, "loss": 9 - 0.1 * step, "skipped": step == 1, "measured":
                                {{"tokens_per_s": speed, "memory_gib": 26 + 1.5 * size, "mfu": size / 100}}}}) + "\\n")
if {hangs}:
    time.sleep(600)
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Makes the trainer: the largest size that fits, the steps after which it waits for ever or ends."""
    def make(largest=100, steps=STEPS + 3, hangs=True):
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / "pretrain.py").write_text(TRAINER.format(largest=largest, steps=steps, hangs=hangs))

    monkeypatch.setattr(train_sweep, "ROOT", tmp_path)
    return make


def soon():
    return time.monotonic() + 300


def test_sizes_grow_until_one_does_not_fit_and_the_fastest_runs_with_dropout(trainer, tmp_path, capsys):
    trainer(largest=16)
    rows = sweep(tmp_path, [8, 16, 24, 48], FULL, soon())
    assert [(row["micro_batch"], row["dropout"], row.get("tokens_per_s")) for row in rows] == \
        [(8, 0.0, 800), (16, 0.0, 1600), (24, 0.0, None), (16, 0.1, 1280)]
    assert rows[1]["losses"] == pytest.approx([9 - 0.1 * step for step in range(1, STEPS + 1)])
    assert (rows[1]["peak_gib"], rows[1]["skipped"]) == (50.0, 1)
    out = capsys.readouterr().out
    assert "micro-batch  16, dropout 0.0: 1,600 tokens/s, MFU 0.16, 50.0 GiB, loss 8.900 -> 8.200" in out
    assert "micro-batch  24, dropout 0.0: pretrain: error: out of memory" in out
    assert not (tmp_path / "run").exists()


def test_a_plan_takes_its_speed_from_the_result(trainer, tmp_path):
    trainer()
    recipe = FULL | {"run.device": "cpu"}
    content = result(sweep(tmp_path, [8, 16], recipe, soon()), recipe)
    assert content["gib_a_sequence"] == 1.5
    assert content["micro_batch"] == 16
    content["environment"]["gpu"] = "NVIDIA H100 80GB HBM3"
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100" / "train.json").write_text(json.dumps(content))
    peak, flops = GPUS["h100-80"].half_tflops * 1e12, content["flops_per_token"]["with attention"]
    assert measured_mfu(GPUS["h100-80"], False, tmp_path)[0] == 1600 * flops / peak
    assert measured_mfu(GPUS["h100-80"], True, tmp_path)[0] == 1280 * flops / peak


def test_a_run_that_ends_early_or_takes_too_long_is_no_result(trainer, tmp_path):
    trainer(steps=STEPS - 1, hangs=False)
    assert measure(tmp_path, 1, 0.0, TINY, soon()) == {"micro_batch": 1, "dropout": 0.0, "error": "nothing was printed"}
    trainer(steps=STEPS - 1)
    row = measure(tmp_path, 1, 0.0, TINY, time.monotonic() + 2)
    assert row["error"] == train_sweep.TIME_UP
    assert fastest([row]) is None
    assert "tokens_per_s" not in result([row], TINY)


@pytest.mark.parametrize(("largest", "code"), [(1, 0), (0, 1)])
def test_the_exit_code_says_if_any_size_fitted(trainer, tmp_path, monkeypatch, largest, code):
    trainer(largest=largest)
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path / "out"), "--rehearse"])
    assert train_sweep.main() == code
    assert len(json.loads((tmp_path / "out" / "train.json").read_text())["rows"]) == (3 if largest else 1)


def test_a_trainer_that_breaks_is_a_failure(trainer, tmp_path, monkeypatch):
    trainer(steps=2, hangs=False)
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path / "out"), "--rehearse"])
    assert train_sweep.main() == 1


def test_without_a_gpu_it_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["", "--out", str(tmp_path)])
    assert train_sweep.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
