"""Runs over two machines, each with an agent of torchrun: the shared folder, and corpora that differ."""

import shutil
import socket
import subprocess

import pytest
from training_runs import STEPS, command, finished, in_processes, starts, steps, wait_for

from phi1.train.metrics.ledger import read_ledger
from phi1.train.run import folder as runfolder
from phi1.train.run.folder import RunFolder
from phi1.train.runtime.all_ranks import Failed
from phi1.train.runtime.engine import connect_processes, start


def on_two_machines(places, run, processes, **changes):
    """Return the exit code and output of the agent of each machine; rank 0 is on the first."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    words = command(run, processes, **changes)
    at = words.index("--standalone")
    words[at:at + 1] = ["--nnodes", "2", "--master-addr", "localhost", "--master-port", str(port)]
    agents = [subprocess.Popen([*words[:at], "--node-rank", str(number), *words[at:]], cwd=place, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
              for number, place in enumerate(places)]
    try:
        said = agents[0].communicate(timeout=240)[0]
        if agents[0].returncode:  # the other machine gives it 20 s to say why
            agents[1].terminate()
        silent = agents[1].communicate(timeout=240)[0]
    finally:
        for agent in agents:
            agent.terminate()  # torchrun ends its workers, too
            agent.wait()
    return [(agents[0].returncode, said), (agents[1].returncode, silent)]


@pytest.fixture
def other(place, tmp_path):
    """A second machine with the same corpus on a disk of its own."""
    shutil.copytree(place / "data", tmp_path / "data")
    return tmp_path


@pytest.mark.slow
def test_two_machines_hold_a_replica_each(place, uninterrupted):
    (first, said), (second, silent) = on_two_machines([place, place], "machines", 2, train__steps=12,
                                                      train__schedule_steps=STEPS, checkpoint__every=0)
    assert (first, second) == (0, 0), said + silent
    assert "(4 x cpu in 2 replicas, 1 threads, fp32)" in said
    assert "replicas" not in silent, "rank 0 alone speaks"
    begun = read_ledger(place / "machines" / "ledger.jsonl")[0]["start"]
    assert (begun["environment"]["world_size"], begun["environment"]["replicas"]) == (4, 2)
    for four, one in zip(steps(place, "machines"), steps(place, "whole"), strict=False):
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert four["norm"] == pytest.approx(one["norm"], rel=1e-3)


@pytest.mark.slow
def test_a_run_folder_of_each_machine_s_own_is_refused(place, other):
    (code, said), _ = on_two_machines([place, other], "apart", 1)
    assert code == 1  # torchrun's, of any worker that fails
    assert "run.folder apart: rank 1 on " in said
    assert "does not find there what rank 0 writes: it must lie on a disk that all machines share" in said
    assert not (place / "apart" / "ledger.jsonl").exists()


@pytest.mark.slow
def test_a_damaged_corpus_of_another_machine_is_named(place, other):
    shard = other / "data" / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    (code, said), _ = on_two_machines([place, other], str(place / "shared"), 1)
    assert code == 1
    assert f"error: rank 1 on {socket.gethostname()}: data/train-00000.bin: damaged: its content hash is wrong" in said
    assert not (place / "shared" / "ledger.jsonl").exists()


@pytest.mark.slow
def test_when_one_machine_s_torchrun_dies_the_others_save_and_are_restarted(place):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    agents = []
    for host in (1, 0):
        launcher = ("--nnodes", "1:2", "--max-restarts", "2", "--rdzv-backend", "c10d", "--rdzv-id", "machines",
                    "--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost", "--rdzv-conf",
                    f"is_host={host},last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=2")
        words = command("survivor", 1, launcher=launcher, train__steps=200, train__schedule_steps=STEPS,
                        checkpoint__every=0)
        words.remove("--standalone")
        agents.append(subprocess.Popen(words, cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       start_new_session=True))
    survivor, dying = agents
    try:
        wait_for(survivor, lambda: finished(place, "survivor") >= 3)
        dying.kill()
        out, err = survivor.communicate(timeout=300)
    finally:
        for agent in agents:
            agent.terminate()
            agent.communicate()
    assert survivor.returncode == 0, err
    said = out + err  # rank 0 may have been on either
    assert starts(place, "survivor") == 2
    assert [step["step"] for step in steps(place, "survivor")] == list(range(1, 201))
    assert "world_size was 2, is 1" in said


def folder_checked(rank, store, folders):
    """Return the error that each process finds in its folder, or None."""
    runfolder.NETWORK_SECONDS = 0.1
    connect_processes(start(rank, "cpu", "fp32", 1), rank, store)
    try:
        return RunFolder(folders[rank.rank]).check_shared(rank.rank)
    except Failed as error:
        return str(error)


@pytest.mark.parametrize("names", [("one", "one"), ("one", "two")])
def test_every_process_looks_for_what_rank_0_writes(tmp_path, names):
    folders = [tmp_path / name for name in names]
    for folder in set(folders):
        folder.mkdir()
    found = in_processes(2, folder_checked, tmp_path, folders)
    wrong = (f"run.folder {folders[1]}: rank 1 on {socket.gethostname()} does not find there what rank 0 writes: it "
             "must lie on a disk that all machines share")
    assert found == ([None, None] if len(set(names)) == 1 else [wrong, wrong])
    assert not list(folders[0].iterdir()), "nothing is left behind"
