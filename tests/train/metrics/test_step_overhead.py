"""The time that the ledger, the watchdog and the heartbeat add to a step."""

import statistics
import time

import torch

from phi1.train.metrics.ledger import Ledger
from phi1.train.metrics.mfu import Mfu
from phi1.train.metrics.progress import Progress
from phi1.train.runtime.engine import Engine, peak_memory_gib
from phi1.train.runtime.watchdog import HEARTBEAT_SECONDS, Watchdog
from phi1.train.step.trainer import Outcome

NANO_STEP_SECONDS = 0.16  # 1,250 steps in 200 s on two idle CPU cores; a step of phi-1 on 8 A100 takes 13 s


def test_ledger_watchdog_and_heartbeat_take_half_a_percent_of_a_step(tmp_path):
    watchdog = Watchdog(0, 1800.0, tmp_path / "heartbeat.json")
    ledger, progress = Ledger(tmp_path / "ledger.jsonl", 0), Progress(10**6, 0, 1024, silent=True)
    engine, mfu = Engine(torch.device("cpu"), "fp32", 1, 1), Mfu(8.4e6, 8.2e6, 1e12)
    steps, beats = [], []
    for step in range(1, 501):
        began = time.thread_time()  # this thread's own time: what else the machine does has no part in it
        watchdog.report(f"step {step}")
        progress.step(step, 4.321, 0.16)
        ledger.step(Outcome(step, 4.321, 1e-3, 0.5, 1.0, False, "0123456789abcdef"),
                    {"tokens_per_s": 6400.0, "seconds": 0.16, "memory_gib": peak_memory_gib(engine),
                     **mfu.of(6400.0)})
        steps.append(time.thread_time() - began)
    for _ in range(50):
        began = time.thread_time()
        watchdog._beat("step 7", 1.0)
        beats.append(time.thread_time() - began)
    ledger.close()
    each_step = statistics.median(steps) + statistics.median(beats) * NANO_STEP_SECONDS / HEARTBEAT_SECONDS
    assert each_step <= 0.005 * NANO_STEP_SECONDS  # 0.06 % measured
