"""The examples run as they are, from another folder, on a CPU and without network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# The smallest model that trains: the example's own model takes minutes.
TINY = ["--train.steps", "4", "--train.warmup_steps", "1", "--data.seq_len", "64", "--model.num_hidden_layers", "1",
        "--model.hidden_size", "64", "--model.intermediate_size", "128", "--model.num_attention_heads", "2",
        "--eval.sequences", "4", "--eval.completions", "1", "--run.device", "cpu"]


def run(folder: Path, name: str, *words: str) -> str:
    """Run an example in a folder and return what it printed."""
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # phi1 and torchrun of this Python
    start = [sys.executable] if name.endswith(".py") else ["bash"]
    done = subprocess.run(
        [*start, str(EXAMPLES / name), *words], cwd=folder, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PATH": commands, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_operation_is_used(tmp_path):
    out = run(tmp_path, "use_an_operation.py")
    assert [line.split(":")[0] for line in out.splitlines()[1:]] == ["dx [1024, 256]", "dweight [8192, 256]",
                                                                     "dbias [8192]"]


@pytest.mark.long
def test_a_model_is_trained_on_a_folder_and_completes(tmp_path):
    out = run(tmp_path, "train_on_your_code.sh", str(ROOT / "kernels"), "mine", *TINY)
    assert "steps         1 to 4, 1 start" in out
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["data", "run"]
    out = run(tmp_path, "load_and_complete.py", "mine/run/export", "--max-new-tokens", "3")
    assert [line.split(",")[0] for line in out.splitlines() if line.startswith("--- ")] == [
        "--- greedy", "--- sampled", "--- batch", "--- saved and loaded: equal logits"]


def test_an_operation_is_benchmarked_beside_a_peer(tmp_path):
    out = run(tmp_path, "benchmark_an_operation.py", "rotary", "--seconds", "0.05", "--json", "results.json")
    assert "of the measured roof" in out
    assert "torch takes" in out
    assert (tmp_path / "results.json").exists()


def test_every_example_is_short_and_has_a_test():
    examples = sorted(path for path in EXAMPLES.iterdir() if path.is_file())
    tested = Path(__file__).read_text()
    assert len(examples) >= 4
    for path in examples:
        assert f'"{path.name}"' in tested, path.name
        assert len(path.read_text().splitlines()) <= 60, path.name
