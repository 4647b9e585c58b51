"""How processes agree to stop: the time limit, counted from the launch, and where in the data a run goes on.

And what a signal does before the first step and after the last.
"""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import xxhash
from torch.distributed import HashStore
from training_runs import SCRIPT, start, steps, train, weights

from phi1.train import pretrain
from phi1.train.data.batch_plan import BatchPlan, micro_batches, samples_of_step
from phi1.train.data.corpus import Corpus
from phi1.train.data.shards import BLOCK_TOKENS, Shard, ShardHeader
from phi1.train.evaluate.validation import Figures
from phi1.train.recipe.file import read_recipe
from phi1.train.run import run as run_module
from phi1.train.run.folder import RunFolder
from phi1.train.run.start import Start
from phi1.train.runtime.launch import GO_ON, INTERRUPTED, Rank, _age
from phi1.train.runtime.stop_signals import StopSignals


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_time_limit_counts_from_the_launch(alone):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    time.sleep(0.3)
    assert 0.2 < _age(process.pid) < 60
    process.communicate(b"\n")
    assert _age(process.pid) == 0.0  # gone, so that the system does not say
    minutes = _age(os.getpid()) / 60
    assert not StopSignals(Rank()).agreed_to_stop()
    assert not StopSignals(Rank(), minutes + 1).agreed_to_stop()
    over = StopSignals(Rank(), minutes / 2)
    assert over.agreed_to_stop()
    assert over.reason == "run.time_limit"


def test_a_run_at_its_time_limit_saves_and_the_same_command_goes_on(place, uninterrupted):
    process = start(place, "limited", run__time_limit=0.0001)
    out, err = process.communicate(timeout=300)
    assert process.returncode == GO_ON, err
    assert "stopped by run.time_limit after step 0 of 60, which is saved in limited/checkpoints/step-0; go on" in out
    restart = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "1"}
    restarted = start(place, "limited", environment=restart, run__time_limit=0.0001)  # torchrun's, of a worker's 75
    assert restarted.communicate(timeout=300) == ("", "")
    assert restarted.returncode == GO_ON
    train(place, "limited")
    assert steps(place, "limited") == steps(place, "whole")
    assert weights(place, "limited") == weights(place, "whole")


@pytest.mark.parametrize(("there", "options", "then"), [
    ("checkpoints/step-3", [], "goes on from the newest checkpoint"),
    ("checkpoints/step-3", ["--prove-resume", "2"], "begins anew"),
    ("checkpoints/.step-3.tmp", [], "begins anew"),
])
def test_an_interruption_says_what_the_same_command_will_do(tmp_path, monkeypatch, capsys, there, options, then):
    def interrupted(*_):
        raise KeyboardInterrupt

    (tmp_path / there).mkdir(parents=True)
    ignored = []
    monkeypatch.setattr(pretrain, "on_signals", ignored.append)
    monkeypatch.setattr(pretrain, "start_or_resume", interrupted)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--run.folder", str(tmp_path), *options])
    assert pretrain.main() == (GO_ON if "goes on" in then else INTERRUPTED)
    assert capsys.readouterr().err == f"pretrain: interrupted; the same command {then}\n"
    assert ignored == [signal.SIG_IGN]  # the second one of a Ctrl-C


@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py"])
def test_an_interruption_while_modules_are_imported_is_one_line(tmp_path, script):
    (tmp_path / "pydantic.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run([sys.executable, SCRIPT.with_name(script)], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == f"{script.removesuffix('.py')}: interrupted; the same command begins anew\n"


@pytest.mark.parametrize("signalled", [None, "SIGTERM"])
def test_a_signal_in_the_export_interrupts_it(tmp_path, monkeypatch, signalled):
    def export(*_):
        handlers.extend(signal.getsignal(number) for number in numbers)
        raise KeyboardInterrupt

    numbers, handlers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), []
    before = [signal.getsignal(number) for number in numbers]
    trained = SimpleNamespace(
        trainer=SimpleNamespace(finished=9, skipped=0), saving=SimpleNamespace(best=None, failure=None),
        evaluation=SimpleNamespace(held_out=SimpleNamespace(text=b"x"), samples=SimpleNamespace(tokenizer=None)),
        stop_signals=SimpleNamespace(reason=signalled),
        monitor=SimpleNamespace(progress=SimpleNamespace(tokens=4, tokens_per_s=lambda finished: 1.0)))
    monkeypatch.setattr(run_module, "train", lambda *_: (trained, (Figures(1.0, 1.0, 1, 1), None), {}))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(run_module, "export", export)
    try:
        with pytest.raises(KeyboardInterrupt):  # main's to say
            run_module.run(read_recipe(None, {}), RunFolder(tmp_path), Rank(), None, Start())
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert handlers == ([] if signalled else [signal.default_int_handler] * 3)


def test_the_data_are_positioned_at_any_step_within_a_second(tmp_path):
    recipe = read_recipe(SCRIPT.parent / "configs" / "phi1-base.toml", {})
    seq_len, batch, n_tokens = recipe.data.seq_len, recipe.train.batch_size, 7_000_000_000
    whole = xxhash.xxh3_64_intdigest(bytes(2 * BLOCK_TOKENS))
    header = ShardHeader(ShardHeader.size(n_tokens, BLOCK_TOKENS), n_tokens, "0" * 64, BLOCK_TOKENS,
                         (whole,) * -(-n_tokens // BLOCK_TOKENS))
    (tmp_path / "shard").write_bytes(header.pack())
    os.truncate(tmp_path / "shard", header.header_bytes + 2 * n_tokens)  # 14 GB that take no room
    corpus = Corpus(tmp_path, "train", "", n_tokens, 0, 51200, 50256, (Shard(tmp_path / "shard", "0" * 64),))
    batch_plan = BatchPlan.of(batch, 16, 3, 8)
    began = time.process_time()  # of this process: what else the machine does has no part in it
    samples = samples_of_step(24_000, batch, 1, corpus.n_samples(seq_len))
    _, rows = next(micro_batches(corpus, samples, batch_plan, seq_len))
    assert time.process_time() - began < 1
    assert rows.shape == (16, seq_len + 1)
    assert len(set(samples.tolist())) == batch
