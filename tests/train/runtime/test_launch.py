"""Starting under torchrun: the rank, the store, and a process whose torchrun has been killed."""

import os
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist
from torch.distributed import HashStore
from training_runs import wait_until

from phi1.train import pretrain
from phi1.train.runtime import launch
from phi1.train.runtime.launch import Rank, RunError, connect
from phi1.train.runtime.stop_signals import StopSignals


@pytest.fixture
def started(monkeypatch):
    """The rank of the first of two processes under torchrun, and a function that ends torchrun."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_USE_AGENT_STORE": True,
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, f"{value}")
    return Rank.from_environment(), lambda: monkeypatch.setattr(os, "getppid", lambda: 1)


@pytest.mark.parametrize(("option", "seconds"), [("--train.step=3", 180), ("--train.seed=3", 20)])
def test_what_every_process_refuses_is_for_long_left_to_rank_0(started, tmp_path, monkeypatch, capfd, option, seconds):
    def refused(*_):
        raise RunError("refused")

    slept = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(launch.time, "sleep", slept.append)
    monkeypatch.setattr(launch.os, "_exit", sys.exit)
    monkeypatch.setattr(pretrain, "start_or_resume", refused)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--run.folder", str(tmp_path), option])
    with pytest.raises(SystemExit, match="2"):
        pretrain.main()
    assert slept == [seconds]
    assert capfd.readouterr().err.startswith("pretrain: error: rank 1: ")


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "x"), ("RANK", "2"), ("RANK", "-1"), ("LOCAL_RANK", ""),
                                             ("TORCHELASTIC_RESTART_COUNT", "1.5")])
def test_numbers_that_torchrun_would_not_give_are_one_line(started, monkeypatch, capfd, name, value):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(launch.os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "argv", ["train/finetune.py"])
    with pytest.raises(SystemExit, match="2"):
        pretrain.main()
    error = capfd.readouterr().err
    assert error.startswith("finetune: error: torchrun numbers the processes it starts; for one alone unset RANK and ")
    assert f"{name}={value}" in error
    assert error.count("\n") == 1


def test_the_place_is_what_torchrun_says(started, monkeypatch):
    assert started[0] == Rank(0, 2, launcher=os.getppid())
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Rank.from_environment() == Rank(7, 8, 1, 2, 3, os.getppid())
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert Rank.from_environment() == Rank(7, 8, 1, 2, 3)
    monkeypatch.delenv("RANK")
    assert Rank.from_environment() == Rank()


def test_the_end_of_torchrun_is_noticed_whenever_it_was(started):
    place, end = started
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        assert not StopSignals(place).agreed_to_stop()
        end()  # while the data are prepared, say
        stop_signals = StopSignals(place)
        assert stop_signals.agreed_to_stop()
        assert stop_signals.reason == f"the end of torchrun on {socket.gethostname()}"
        assert not StopSignals(Rank()).agreed_to_stop()
    finally:
        dist.destroy_process_group()


def test_a_store_that_has_ended_with_torchrun_is_one_line_at_once(started, monkeypatch, capfd):
    place, _ = started
    monkeypatch.setattr(dist, "TCPStore", None)  # which tries for nine minutes
    with pytest.raises(RunError, match=r"^torchrun does not answer at 127\.0\.0\.1:\d+: Connection refused$"):
        connect(place)
    assert capfd.readouterr() == ("", "")


def test_a_store_that_answers_is_taken(started, monkeypatch):
    place, _ = started
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", f"{store.port}")
    connect(place).set("word", "x")
    assert store.get("phi1/attempt0/word") == b"x"


@pytest.mark.parametrize("ended", [True, False])
def test_what_fails_for_want_of_torchrun_is_one_line_and_what_else_fails_is_a_mistake_of_ours(
        started, tmp_path, monkeypatch, ended):
    def loses(*_):
        if ended:
            started[1]()
        raise RuntimeError("Connection reset by peer\nframe #0: c10::Error")

    def stop_with(line, *_, code):
        assert code == launch.GO_ON
        raise SystemExit(line)

    monkeypatch.setattr(pretrain, "start_or_resume", loses)
    monkeypatch.setattr(pretrain, "stop_with", stop_with)
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--run.folder", str(tmp_path)])
    with pytest.raises((SystemExit, RuntimeError)) as error:
        pretrain.main()
    assert str(error.value).startswith("torchrun has ended; the same command goes on" if ended else "Connection reset")


@pytest.mark.parametrize(("given", "shown"), [
    ("torchrun --nnodes 1:2 --max-restarts 3 --nproc_per_node=2", "--nnodes 1:2 --max-restarts 3 --nproc_per_node=2"),
    ("-m torch.distributed.run --node_rank 1 --nnodes=2", "--node_rank NUMBER --nnodes=2"),
    ("/bin/torchrun --node-rank=1 --rdzv-id a", "--node-rank=NUMBER --rdzv-id a"),
])
def test_the_command_to_go_on_has_the_options_that_torchrun_was_given(monkeypatch, given, shown):
    words = [sys.executable, "-c", "input()", *given.split(), "train/finetune.py", "--train.steps", "3"]
    monkeypatch.setattr(sys, "argv", ["train/finetune.py"])
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        rank = Rank(world_size=4, local_world_size=2, launcher=process.pid)
        wait_until(lambda: launch.launcher_options.__wrapped__(process.pid))
        assert rank.command("--x 1") == f"torchrun {shown} train/finetune.py --x 1"
        process.communicate(b"\n")
    assert rank.command("--x 1") == f"torchrun {shown} train/finetune.py --x 1", "as well once torchrun has ended"


@pytest.mark.parametrize("variables", [{"LOCAL_RANK": "1"}, {"WORLD_SIZE": "9" * 5000}])
def test_numbers_that_torchrun_would_not_set_are_refused(monkeypatch, variables):
    for name, value in ({"RANK": "0", "WORLD_SIZE": "1"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match="torchrun numbers the processes"):
        Rank.from_environment()


@pytest.mark.parametrize("port", ["x", "99999999"])
def test_a_port_that_is_none_is_one_line(monkeypatch, port):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(RunError, match="MASTER_PORT must be a port, 1 to 65535"):
        connect(Rank(0, 2, 0, 2))
