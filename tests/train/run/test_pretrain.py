"""`train/pretrain.py` in real processes, which are killed and resumed, on a tiny corpus and a tiny model."""

import fcntl
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from training_runs import (
    STEPS,
    TINY,
    command,
    error_line,
    finished,
    release,
    run,
    start,
    steps,
    train,
    wait_for,
    weights,
)

from phi1.train.checkpoint.files import checkpoints, find_damage
from phi1.train.metrics.ledger import read_ledger
from phi1.train.runtime.launch import GO_ON


def test_a_run_ends_with_a_summary_an_export_and_a_falling_loss(place, uninterrupted):
    losses = [step["loss"] for step in steps(place, "whole")]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 2
    for pattern in (rf"trained +{STEPS} steps, 15,360 tokens, [\d,]+ tokens/s", r"validation loss +\d\.\d{4} nats",
                    r"bits per byte +\d\.\d{4} on [\d,]+ held-out bytes; xz -9 on the same bytes \d\.\d{4}: \w+",
                    r"temperature 0\.7, seed 1:\n\ndef scale_",
                    r"next +phi1 generate --model whole/export --prompt 'def"):
        assert re.search(pattern, uninterrupted), (pattern, uninterrupted)
    folder = place / "whole"
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-40", "step-60"]
    assert {path.name for path in folder.iterdir()} == {".lock", "config.toml", "ledger.jsonl", "heartbeat.json",
                                                        "checkpoints", "export", "summary.json"}
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
    lines = read_ledger(folder / "ledger.jsonl")
    assert lines[0]["start"]["environment"]["threads"] == 1
    assert lines[-1]["eval"]["step"] == STEPS
    assert set(lines[1]) == {"step", "loss", "lr", "norm", "scale", "skipped", "samples", "measured"}


def test_the_export_is_the_trained_model(place, uninterrupted):
    import phi1

    model, tokenizer = phi1.load(place / "whole" / "export"), phi1.load_tokenizer(place / "whole" / "export")
    text = phi1.generate(model, tokenizer, "def scale_3_4(values, factor", max_new_tokens=8)[0]
    assert text.startswith("=")


def test_again_it_says_that_the_run_is_complete(place, uninterrupted):
    again = train(place, "whole")
    assert "whole is complete: 60 steps" in again
    assert "--train.steps 120" in again
    assert "--run.folder whole-2" in again


def test_a_longer_run_goes_on_where_the_shorter_one_ended(place, uninterrupted):
    shutil.copytree(place / "whole", place / "longer")
    out = train(place, "longer", train__steps=70)
    assert "going on" in out
    assert "note: the learning rate now falls over 70 steps, before over 60; the next step takes 0.0005" in out
    assert "other rounding" not in out
    assert [step["step"] for step in steps(place, "longer")] == list(range(1, 71))
    assert steps(place, "longer")[:STEPS] == steps(place, "whole")


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(place, uninterrupted):
    process = start(place, "killed", hold="step-40")
    wait_for(process, (place / "killed" / "checkpoints" / "step-20").exists)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = steps(place, "killed")
    assert 20 <= len(done) < STEPS
    with open(place / "killed" / "ledger.jsonl", "a") as file:  # as if killed in the middle of a line
        file.write('{"step": 21, "lo')
    assert "going on" in train(place, "killed", train__activations="block")  # which changes no bit
    assert steps(place, "killed") == steps(place, "whole")
    assert weights(place, "killed") == weights(place, "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(place, uninterrupted, number):
    name = number.name.lower()
    process = start(place, name, hold="step-40", checkpoint__every=40)
    wait_for(process, lambda: finished(place, name) > 2)
    process.send_signal(number)
    process.send_signal(number)
    release(place, name)
    out, err = process.communicate(timeout=300)
    assert process.returncode == GO_ON, err
    match = re.search(rf"stopped by {number.name} after step (\d+) of {STEPS}, which is saved in \S+; go on with: "
                      rf"python (\S+) --config (\S+)$", out, re.MULTILINE)
    assert match, out
    assert len(steps(place, name)) == int(match[1]) < STEPS
    assert find_damage(place / name / "checkpoints" / f"step-{match[1]}") is None
    resumed = subprocess.run([sys.executable, match[2], "--config", match[3]], cwd=place, text=True,
                             capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    assert steps(place, name) == steps(place, "whole")
    assert weights(place, name) == weights(place, "whole")


def test_two_processes_stop_and_resume_exactly_and_give_the_losses_of_one(place, uninterrupted, uninterrupted_pair):
    # torchrun kills after 30 s, which a busy machine may take to save; older versions do not read this.
    process = start(place, "two", 2, hold="step-40", environment={"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"})
    wait_for(process, (place / "two" / "checkpoints" / "step-20").exists)
    process.send_signal(signal.SIGTERM)
    release(place, "two")
    out, err = process.communicate(timeout=300)
    assert re.search(r"stopped by SIGTERM after step \d+ of 60.*; go on with: torchrun --standalone --nproc-per-node 2",
                     out), out
    assert "Error" not in re.sub("ChildFailedError|SignalException", "", err)
    train(place, "two", 2)
    assert steps(place, "two") == steps(place, "pair")
    assert weights(place, "two") == weights(place, "pair")
    one, two = steps(place, "whole"), steps(place, "two")
    assert [step["samples"] for step in one] == [step["samples"] for step in two]
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(one, two, strict=True)) <= 1e-5
    assert max(abs(a["norm"] / b["norm"] - 1) for a, b in zip(one, two, strict=True)) <= 1e-3


def test_steps_that_stay_not_finite_stop_the_run(place):
    line = error_line(run(place, "diverging", train__lr="1e30", train__clip=0, train__warmup_steps=0,
                          train__max_skips=4, train__find_nonfinite="true"))
    assert re.search(r"the last 4 steps were skipped \(train.max_skips\), step \d+ since its gradient is not finite; "
                     r"first not finite: (blocks.\d|embed|head|norm)\S*, \S+, (forward|backward): .*largest finite "
                     r"value .*; samples \[\d+, \d+, \d+, \d+\], micro-step 1, rank 0 \(loss nan, loss scale 1\); "
                     r"checkpoints: step-\d+; go on with --run\.change train\.lr=3\.3e\+29, from a checkpoint before",
                     line), line
    assert [step["skipped"] for step in steps(place, "diverging")][-4:] == [True] * 4


def test_the_ledger_names_versions_recipe_and_changes(place, uninterrupted):
    shutil.copytree(place / "whole", place / "described")
    train(place, "described", train__steps=62, checkpoint__every=0)
    first, second = (line["start"] for line in read_ledger(place / "described" / "ledger.jsonl") if "start" in line)
    assert first["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert first["config"]["train"]["steps"] == STEPS
    assert first["changed"] == {}
    assert second["changed"]["train.steps"] == [STEPS, 62]
    assert set(second["changed"]) == {"train.steps", "checkpoint.every", "run.folder"}
    heartbeat = json.loads((place / "described" / "heartbeat.json").read_text())
    assert set(heartbeat) == {"time", "pid", "doing", "for_seconds"}
    lines = read_ledger(place / "described" / "ledger.jsonl")
    measured = [line["measured"] for line in lines if "step" in line]
    assert all(line["measured"]["stall_seconds"] > 0 for line in lines if "saved" in line)
    assert all(0.05 < entry["memory_gib"] < 20 for entry in measured)


def test_workers_save_and_end_when_torchrun_is_killed(place):
    process = start(place, "orphans", 1, train__steps=100_000, train__schedule_steps=60)
    wait_for(process, (place / "orphans" / "checkpoints" / "step-20").exists)
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while True:  # a lock that can be taken says that the worker has ended
        with open(place / "orphans" / ".lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < end, "the worker runs on"
        time.sleep(0.05)
    process.communicate()
    assert checkpoints(place / "orphans" / "checkpoints")[-1].name == f"step-{len(steps(place, 'orphans'))}"


def test_a_disk_that_is_full_costs_one_line_and_no_checkpoint(place, uninterrupted):
    shutil.copytree(place / "whole", place / "full")
    kept = (place / "full" / "checkpoints" / "step-60").stat().st_mtime_ns

    def small_files():  # the limit makes writes fail in the middle, as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = run(place, "full", train__steps=90, preexec_fn=small_files)
    assert "step-80 could not be written" in done.stdout
    assert "step-90 could not be written" in error_line(done)
    folder = place / "full" / "checkpoints"
    assert [path.name for path in checkpoints(folder)] == ["step-40", "step-60"]
    assert (folder / "step-60").stat().st_mtime_ns == kept
    assert find_damage(folder / "step-60") is None
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_nano_gives_the_same_losses_in_one_process_and_in_two(place, tmp_path):
    nano = {key: value for key, value in TINY.items() if not key.startswith("model.")}
    changes = {"data__seq_len": 256, "train__steps": 20, "train__dropout": 0.1, "checkpoint__every": 0}
    for name, processes in (("nano1", 0), ("nano2", 2)):
        words = command(name, processes, **changes)
        for key in TINY.keys() - nano.keys():
            at = words.index(f"--{key}")
            del words[at:at + 2]
        assert subprocess.run(words, cwd=place).returncode == 0
    one, two = steps(place, "nano1"), steps(place, "nano2")
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(one, two, strict=True)) <= 1e-5
