"""`train/pretrain.py` as its users meet it: real processes, really killed, on a tiny corpus and a tiny model."""

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import phi1
from phi1.train.batches import Layout
from phi1.train.checkpoint_files import checkpoints, find_damage
from phi1.train.convert import read_weights
from phi1.train.launch import Place, RunError
from phi1.train.ledger import cut_back, read_ledger
from phi1.train.prepare import prepare

SCRIPT = Path(__file__).parents[1] / "train" / "pretrain.py"
STEPS = 60
TINY = {"model.vocab_size": 512, "model.hidden_size": 64, "model.intermediate_size": 128, "model.num_hidden_layers": 2,
        "model.num_attention_heads": 2, "data.folder": "data", "data.vocab_size": 512, "data.seq_len": 64,
        "train.steps": STEPS, "train.warmup_steps": 10, "train.dropout": 0.1, "train.precision": "fp32",
        "train.threads": 1, "checkpoint.every": 20, "eval.sequences": 8, "eval.completions": 1, "run.device": "cpu",
        "run.tensorboard": "false"}
FUNCTION = '''def scale_{i}_{j}(values, factor={j}):
    """Multiply every value by the factor."""
    result = []
    for value in values:
        result.append(value * factor + {i})
    return result


'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with a prepared corpus in data/."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "source").mkdir()
    for i in range(40):
        (folder / "source" / f"m{i}.py").write_text("".join(FUNCTION.format(i=i, j=j) for j in range(12)))
    prepare(str(folder / "source"), folder / "data", tokenizer="train", vocab_size=512, val_fraction=0.1, workers=1)
    return folder


def command(run, processes=0, **changes):
    """The command line of a run: torchrun with so many processes, or plain Python for 0."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    options = TINY | {"run.folder": run} | {key.replace("__", "."): value for key, value in changes.items()}
    return [*launcher, str(SCRIPT), *(word for key, value in options.items() for word in (f"--{key}", str(value)))]


def start(place, *args, **changes):
    # In a process group of its own, so that a test can clear away all that it started.
    return subprocess.Popen(command(*args, **changes), cwd=place, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)


def run(place, *args, preexec_fn=None, **changes):
    return subprocess.run(command(*args, **changes), cwd=place, text=True, capture_output=True, timeout=300,
                          preexec_fn=preexec_fn)


def train(place, *args, **changes):
    """A run that must succeed. Returns what it printed."""
    done = run(place, *args, **changes)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)


def steps(place, name):
    """The deterministic fields of a run's steps."""
    return [{key: value for key, value in line.items() if key != "measured"}
            for line in read_ledger(place / name / "ledger.jsonl") if "step" in line]


def weights(place, name):
    return (place / name / "export" / "model.safetensors").read_bytes()


def error_line(done):
    """The one line that a refused command prints."""
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pretrain: error: ")
    return lines[0]


@pytest.fixture(scope="module")
def undisturbed(place):
    """A whole run in one process, and what it printed."""
    return train(place, "whole")


def test_a_run_ends_with_a_summary_an_export_and_a_falling_loss(place, undisturbed):
    losses = [step["loss"] for step in steps(place, "whole")]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 2
    for pattern in (rf"trained +{STEPS} steps, 15,360 tokens, [\d,]+ tokens/s", r"validation loss +\d\.\d{4} nats",
                    r"bits per byte +\d\.\d{4} on [\d,]+ held-out bytes; xz -9 on the same bytes \d\.\d{4}: \w+",
                    r"temperature 0\.7, seed 1:\n\ndef scale_",
                    r"next +phi1 generate --model whole/export --prompt 'def"):
        assert re.search(pattern, undisturbed), (pattern, undisturbed)
    folder = place / "whole"
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step-40", "step-60"]
    assert {path.name for path in folder.iterdir()} == {".lock", "config.toml", "ledger.jsonl", "heartbeat.json",
                                                        "checkpoints", "export", "summary.json"}
    assert json.loads((folder / "summary.json").read_text())["steps"] == STEPS
    lines = read_ledger(folder / "ledger.jsonl")
    assert lines[0]["start"]["environment"]["threads"] == 1
    assert lines[-1]["eval"]["step"] == STEPS
    assert set(lines[1]) == {"step", "loss", "lr", "norm", "scale", "skipped", "samples", "measured"}


def test_the_export_is_the_trained_model(place, undisturbed):
    import phi1

    model, tokenizer = phi1.load(place / "whole" / "export"), phi1.load_tokenizer(place / "whole" / "export")
    text = phi1.generate(model, tokenizer, "def scale_3_4(values, factor", max_new_tokens=8)[0]
    assert text.startswith("=")


def test_again_it_says_that_the_run_is_complete(place, undisturbed):
    again = train(place, "whole")
    assert "whole is complete: 60 steps" in again
    assert "--train.steps 120" in again
    assert "--run.folder whole-2" in again


def test_a_longer_run_goes_on_where_the_shorter_one_ended(place, undisturbed):
    shutil.copytree(place / "whole", place / "longer")
    out = train(place, "longer", train__steps=70)
    assert "going on" in out
    assert "note: the learning rate now falls over 70 steps, before over 60; the next step takes 0.0005" in out
    assert "other rounding" not in out
    assert [step["step"] for step in steps(place, "longer")] == list(range(1, 71))
    assert steps(place, "longer")[:STEPS] == steps(place, "whole")


def test_killed_and_resumed_equals_undisturbed_bit_for_bit(place, undisturbed):
    process = start(place, "killed")
    wait_for(place / "killed" / "checkpoints" / "step-20", process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = steps(place, "killed")
    assert 20 <= len(done) < STEPS
    with open(place / "killed" / "ledger.jsonl", "a") as file:  # as if killed in the middle of a line
        file.write('{"step": 21, "lo')
    assert "going on" in train(place, "killed")
    assert steps(place, "killed") == steps(place, "whole")
    assert weights(place, "killed") == weights(place, "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(place, undisturbed, number):
    name = number.name.lower()
    process = start(place, name, checkpoint__every=0)
    wait_for(place / name / "ledger.jsonl", process)
    time.sleep(0.2)
    process.send_signal(number)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
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


def test_two_processes_stop_together_resume_exactly_and_give_the_losses_of_one(place, undisturbed):
    process = start(place, "two", 2)
    wait_for(place / "two" / "checkpoints" / "step-20", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert re.search(r"stopped by SIGTERM after step \d+ of 60.*; go on with: torchrun --standalone --nproc-per-node 2",
                     out), out
    assert "Error" not in re.sub("ChildFailedError|SignalException", "", err)
    train(place, "two", 2)
    train(place, "pair", 2)
    assert steps(place, "two") == steps(place, "pair")
    assert weights(place, "two") == weights(place, "pair")
    one, two = steps(place, "whole"), steps(place, "two")
    assert [step["samples"] for step in one] == [step["samples"] for step in two]
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(one, two, strict=True)) <= 1e-5
    assert max(abs(a["norm"] / b["norm"] - 1) for a, b in zip(one, two, strict=True)) <= 1e-3


def test_any_checkpoint_becomes_a_model(place, undisturbed, monkeypatch, capsys):
    from phi1 import load, load_tokenizer
    from phi1.cli import main

    monkeypatch.chdir(place)
    assert main(["convert", "--model", "whole/checkpoints/step-60", "--out", "converted"]) == 0
    converted, exported = load("converted"), load("whole/export")
    for name, tensor in exported.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name
    assert load_tokenizer("converted").fingerprint == load_tokenizer("whole/export").fingerprint
    assert main(["convert", "--model", "whole/checkpoints/step-40", "--out", "half", "--dtype", "float16"]) == 0
    assert load("half").embed.weight.dtype == torch.float16
    shutil.copytree("whole/checkpoints/step-40", "bad/checkpoints/step-40")
    (place / "bad" / "checkpoints" / "step-40" / ".metadata").write_bytes(b"x")
    assert main(["convert", "--model", "bad/checkpoints/step-40", "--out", "never"]) == 2
    assert "step-40 is damaged: .metadata has 1 bytes" in capsys.readouterr().err
    assert not (place / "never").exists()


def finetune(place, run, **changes):
    words = command(run, **changes)
    words[words.index(str(SCRIPT))] = str(SCRIPT.with_name("finetune.py"))
    return subprocess.run(words, cwd=place, text=True, capture_output=True, timeout=300)


def test_finetuning_starts_from_weights_and_exports_the_best(place, undisturbed):
    # A rate that grows and harms: the best of the evaluations is not the last.
    options = {"model.init": "whole/export", "train.steps": 40, "train.lr": 5, "train.warmup_steps": 40,
               "checkpoint.every": 10, "checkpoint.keep": 1, "eval.every": 10, "data.tokenizer": "data/tokenizer",
               "data.source": "stdlib", "train.batch_size": 4, "train.micro_batch_size": 0}
    done = finetune(place, "tuned", **{key.replace(".", "__"): value for key, value in options.items()})
    assert done.returncode == 0, done.stderr
    losses = {line["eval"]["step"]: line["eval"]["loss"]
              for line in read_ledger(place / "tuned" / "ledger.jsonl") if "eval" in line}
    best = min(losses, key=losses.get)
    assert best < 40, losses
    assert f"exporting step-{best}, whose validation loss {losses[best]:.4f} is the lowest" in done.stdout
    assert [path.name for path in checkpoints(place / "tuned" / "checkpoints")] == [f"step-{best}", "step-40"]
    first = next(line for line in read_ledger(place / "tuned" / "ledger.jsonl") if "step" in line)
    assert first["loss"] < 1.2 * steps(place, "whole")[-1]["loss"]
    weights_then, _ = read_weights(place / "tuned" / "checkpoints" / f"step-{best}")
    exported = phi1.load(place / "tuned" / "export", device="cpu").state_dict()
    assert all(torch.equal(weights_then[name], tensor) for name, tensor in exported.items())


@pytest.mark.parametrize(("changes", "message"), [
    ({"model__init": "nosuch"}, "model.init nosuch: load: there is no folder nosuch"),
    ({"model__init": "whole/export", "model__intermediate_size": 64}, "model.init whole/export: Error.* size mismatch"),
    ({"model__init": "whole/export", "eval__every": 15}, "checkpoint.best needs eval.every to be a multiple of"),
])
def test_finetuning_refuses_in_one_line(place, undisturbed, changes, message):
    options = {"data__tokenizer": "data/tokenizer", "data__source": "stdlib", "train__batch_size": 4,
               "train__micro_batch_size": 0, "eval__every": 20}
    line = error_line(finetune(place, "untuned", **(options | changes)))
    assert re.search(message, line), line


def test_steps_that_stay_not_finite_stop_the_run(place):
    line = error_line(run(place, "diverging", train__lr="1e30", train__clip=0, train__warmup_steps=0,
                          train__max_skips=4))
    assert re.search(r"the gradients of the last 4 steps, up to step \d+, were not finite \(loss nan, loss scale 1; "
                     r"train.max_skips\): the newest checkpoint is none", line), line
    assert [step["skipped"] for step in steps(place, "diverging")][-4:] == [True] * 4


def test_the_ledger_says_what_made_the_run_and_what_changed(place, undisturbed):
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
    wait_for(place / "orphans" / "checkpoints" / "step-20", process)
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


BEFORE_ANYTHING = {  # refused for what the command line says; no run folder appears
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


@pytest.mark.parametrize(("changes", "message"), BEFORE_ANYTHING.values(), ids=BEFORE_ANYTHING)
def test_a_mistake_is_one_line_and_leaves_nothing(place, changes, message):
    (place / "bad.toml").write_text("[train\n")
    before = sorted(place.iterdir())
    if "cuda" in str(changes):
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has CUDA")
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


def test_mistakes_about_an_existing_run_are_one_line(place, undisturbed):
    shutil.copytree(place / "whole", place / "old")
    newest = place / "old" / "checkpoints" / "step-60"

    def refused(**changes):
        return error_line(run(place, "old", **changes))

    assert re.search(r"step-60 belongs to another run: model.hidden_size was 64, is 128; train.lr was 0.003, is 0.001; "
                     r"go on with --config old/config.toml", refused(train__lr=0.001, model__hidden_size=128))
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


def test_other_data_are_refused(place, undisturbed):
    shutil.copytree(place / "whole", place / "fed")
    (place / "more").mkdir()
    (place / "more" / "m.py").write_text("".join(FUNCTION.format(i=i, j=0) for i in range(900)))
    shutil.copy(place / "source" / "m0.py", place / "more")
    prepare(str(place / "more"), place / "other", tokenizer=str(place / "data" / "tokenizer"), workers=1)
    line = error_line(run(place, "fed", data__folder="other", train__steps=70, data__tokenizer="data/tokenizer"))
    assert "was trained on other data than other holds now" in line


def test_a_disk_that_is_full_costs_one_line_and_no_checkpoint(place, undisturbed):
    shutil.copytree(place / "whole", place / "full")
    kept = (place / "full" / "checkpoints" / "step-60").stat()

    def small_files():  # the limit makes writes fail in the middle, as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = run(place, "full", train__steps=90, preexec_fn=small_files)
    assert "step-80 could not be written" in done.stdout
    assert "step-90 could not be written" in error_line(done)
    folder = place / "full" / "checkpoints"
    assert [path.name for path in checkpoints(folder)] == ["step-40", "step-60"]
    assert (folder / "step-60").stat() == kept
    assert find_damage(folder / "step-60") is None
    assert not list(folder.glob(".*"))


def test_a_full_file_system_is_named(place, undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", disk]).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        done = run(place, str(disk / "run"), checkpoint__every=20)
        assert re.search(r"warning: checkpoint \S+step-\d0 could not be written: no disk space: it takes \d\.\d MB, "
                         r"\d\.\d MB are free; free \d\.\d MB more, or give another --run\.folder; the run goes on$",
                         done.stdout, re.MULTILINE), done.stdout
        assert "no disk space" in error_line(done)
        assert all(find_damage(path) is None for path in checkpoints(disk / "run" / "checkpoints"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_the_ledger_is_cut_back_to_a_step(tmp_path):
    path = tmp_path / "ledger.jsonl"
    lines = [{"start": {"finished": 0}}, {"step": 1}, {"step": 2}, {"eval": {"step": 2}}, {"step": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cut_back(path, 2)
    assert read_ledger(path) == lines[:4]
    cut_back(path, 0)
    assert read_ledger(path) == lines[:1]
    cut_back(tmp_path / "absent.jsonl", 5)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize(("batch", "micro", "world"), [(8, 0, 1), (8, 2, 1), (8, 2, 2), (8, 1, 4), (8, 2, 4)])
def test_the_rows_of_all_processes_are_the_batch_once(batch, micro, world):
    layouts = [Layout.of(batch, micro, rank, world) for rank in range(world)]
    rows = [row for layout in layouts for m in range(layout.micro_steps) for row in range(batch)[layout.rows(m)]]
    assert sorted(rows) == list(range(batch))


def test_a_world_that_does_not_divide_the_batch_is_told_what_would():
    with pytest.raises(RunError, match="must be a multiple of the number of processes, 4; got 2; 4 would do, or 1 or 2 "
                                       "processes"):
        Layout.of(2, 0, 0, 4)


def test_a_place_names_the_command_that_started_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train/pretrain.py"])
    assert Place().command("--x 1") == "python train/pretrain.py --x 1"
    four = Place(world_size=4, local_world_size=4, under_torchrun=True)
    assert four.command("--x 1") == "torchrun --standalone --nproc-per-node 4 train/pretrain.py --x 1"


@pytest.mark.slow
def test_nano_gives_the_same_losses_in_one_process_and_in_two(place, tmp_path):
    nano = {key: value for key, value in TINY.items() if not key.startswith("model.")}
    changes = {"data__seq_len": 256, "train__steps": 50, "train__dropout": 0.1, "checkpoint__every": 0}
    for name, processes in (("nano1", 0), ("nano2", 2)):
        words = command(name, processes, **changes)
        for key in TINY.keys() - nano.keys():
            at = words.index(f"--{key}")
            del words[at:at + 2]
        assert subprocess.run(words, cwd=place).returncode == 0
    one, two = steps(place, "nano1"), steps(place, "nano2")
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(one, two, strict=True)) <= 1e-5
