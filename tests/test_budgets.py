"""What the trainer may cost: its lines of code, and what looking on takes of a step."""

import ast
import io
import statistics
import time
import tokenize
from pathlib import Path

import torch

from phi1.train.engine import Engine, peak_memory_gib
from phi1.train.ledger import Ledger
from phi1.train.progress import Progress
from phi1.train.step import Outcome
from phi1.train.utilisation import Utilisation
from phi1.train.watch import HEARTBEAT_SECONDS, Watch

TRAIN = Path(__file__).parents[1] / "train"
# Not the trainer, its data and its checkpoints; all other files are.
BESIDE = {
    "what a run is told and refuses": {"recipe", "recipe_file", "admission", "runfolder"},
    "what it says of itself": {"ledger", "boards", "ledger_report", "provenance", "progress", "utilisation", "report",
                               "profiling", "out_of_memory", "nonfinite"},
    "what it is judged by": {"validation", "samples", "humaneval"},
    "commands of their own": {"plan", "plan_command", "measured", "verify", "convert", "prove"},
    "making a corpus": {"prepare", "sources", "selection", "workspace", "encode_pool", "writer"},
    "tests": {"testing", "disturb"},
}
NANO_STEP_SECONDS = 0.16  # 1,250 steps in 200 s on two idle CPU cores; a step of phi-1 on 8 A100 takes 13 s


def lines_of_code(path):
    """Lines that hold code: no blank ones, comments or docstrings."""
    source = path.read_text()
    texts = {line for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)
             for line in range(node.lineno, node.end_lineno + 1)}
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code = {line for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in blank
            for line in range(token.start[0], token.end[0] + 1)}
    return len(code - texts)


def test_trainer_data_and_checkpoints_are_at_most_1600_lines():
    beside = set().union(*BESIDE.values())
    files = {path.stem: path for path in TRAIN.glob("*.py")}
    assert beside <= files.keys()
    counts = {name: lines_of_code(path) for name, path in files.items() if name not in beside}
    assert {"pretrain", "step", "engine", "loop", "data", "shards", "checkpoint"} <= counts.keys()
    assert sum(counts.values()) <= 1600, counts


def test_ledger_watchdog_and_heartbeat_take_half_a_percent_of_a_step(tmp_path):
    watch = Watch(0, 1800.0, tmp_path / "heartbeat.json")
    ledger, progress = Ledger(tmp_path / "ledger.jsonl", 0), Progress(10**6, 0, 1024, silent=True)
    engine, utilisation = Engine(torch.device("cpu"), "fp32", 1, 1), Utilisation(8.4e6, 8.2e6, 1e12)
    steps, beats = [], []
    for step in range(1, 501):
        began = time.thread_time()  # this thread's own time: what else the machine does has no part in it
        watch.report(f"step {step}")
        progress.step(step, 4.321, 0.16)
        ledger.step(Outcome(step, 4.321, 1e-3, 0.5, 1.0, False, "0123456789abcdef"),
                    {"tokens_per_s": 6400.0, "seconds": 0.16, "memory_gib": peak_memory_gib(engine),
                     **utilisation.of(6400.0)})
        steps.append(time.thread_time() - began)
    for _ in range(50):
        began = time.thread_time()
        watch._beat("step 7", 1.0)
        beats.append(time.thread_time() - began)
    ledger.close()
    each_step = statistics.median(steps) + statistics.median(beats) * NANO_STEP_SECONDS / HEARTBEAT_SECONDS
    assert each_step <= 0.005 * NANO_STEP_SECONDS  # 0.06 % measured
