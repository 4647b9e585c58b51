"""A peer that takes the GPU's context with it: what is recorded, and how the same command goes on without it."""

import json

import pytest
from double_case import double, make

from phi1.bench import cli
from phi1.bench.cases import registry
from phi1.bench.harness import environment, runner, timing
from phi1.bench.harness.providers import plain
from phi1.bench.harness.roof import Roof
from phi1.bench.report.results import read
from phi1.cli.main import main

GONE = "CUDA error: an illegal memory access was encountered"


class NoProbes:
    def sample(self, turn):
        pass

    def roof(self):
        return Roof(20.0, 0.1)


class Machine:
    """A device, and peers of which some take it with them; each process has it anew."""

    def __init__(self, monkeypatch, path):
        self.path, self.gone, self.deadly, self.ran = path, False, {("b", "bad")}, []
        self.after, self.exclusive = 0, False
        monkeypatch.setattr(runner, "still_there", self.still_there)
        monkeypatch.setattr(runner, "MOST_ROUNDS", 5)
        monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 0.0)  # one call a round
        monkeypatch.setattr(runner, "Probes", lambda *arguments: NoProbes())
        monkeypatch.setattr(runner, "measure", lambda *arguments: Roof(20.0, 0.1))
        monkeypatch.setenv(environment.COMMIT_VARIABLE, "abc1234")
        monkeypatch.setattr(registry, "select", lambda *selection: [self.case(name) for name in "abc"])

    def still_there(self, device):
        if self.gone:
            raise runner.DeviceLostError(f"the GPU does not answer any more: {GONE}")

    def peer(self, of, name):
        def function(inputs):
            assert not self.gone, "nothing runs on a device that is lost"
            self.ran.append((of, name))
            if (of, name) in self.deadly and self.ran.count((of, name)) > self.after:
                self.gone = True
                raise RuntimeError(GONE)
            return double(inputs)

        return function

    def case(self, name):
        peers = [plain(peer, self.peer(name, peer)) for peer in ("torch", "bad", "good")]
        return make(*peers, function=self.peer(name, "phi1"), name=name, exclusive=self.exclusive)

    def run(self, *more):
        """The same command in a new process; its exit code."""
        self.gone, self.ran = False, []
        return main(["bench", "--device", "cpu", "--quick", "--seconds", "0.01", "--json", str(self.path), *more])

    def rows(self):
        return {record["case"]: {entry["provider"]: entry["status"] for entry in record["providers"]}
                for record in read(self.path)["cases"]}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path / "r.json")


WHOLE = {"phi1": "ok", "torch": "ok", "bad": "ok", "good": "ok"}


@pytest.mark.parametrize("after", [0, 4], ids=["as it is checked", "in its rounds"])
@pytest.mark.parametrize("exclusive", [False, True])
def test_the_same_command_goes_on_without_the_peer_that_lost_the_gpu(machine, capsys, after, exclusive):
    machine.after, machine.exclusive = after, exclusive
    assert machine.run() == 3
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "phi1 bench: b: bad: the GPU does not answer any more: CUDA error" in said
    assert "the same command goes on without bad there" in said
    rows = machine.rows()
    assert rows["a"] == WHOLE
    assert rows["b"]["bad"] == "failed" == rows["b"]["good"]
    assert "c" not in rows
    reasons = {entry["provider"]: entry.get("reason") for entry in read(machine.path)["cases"][1]["providers"]}
    assert reasons["bad"] == f"RuntimeError: {GONE}; the GPU's context went with it"
    assert reasons["good"] == "not run to its end: bad took the GPU's context with it"

    assert machine.run() == 0
    assert machine.ran[0][0] == "b", "what is finished is not run again"
    assert ("b", "bad") not in machine.ran
    assert machine.rows() == {"a": WHOLE, "b": WHOLE | {"bad": "failed"}, "c": WHOLE}
    (entry,) = [entry for entry in read(machine.path)["cases"][1]["providers"] if entry["provider"] == "bad"]
    assert "took the GPU's context with it in an earlier run" in entry["reason"]

    assert machine.run() == 0
    assert machine.ran[0][0] == "a", "a run that was finished begins anew"
    assert ("b", "bad") not in machine.ran, "but not that"


def test_several_of_them_and_phi1_itself(machine, capsys):
    machine.deadly = {("a", "phi1"), ("a", "good"), ("c", "torch")}
    assert [machine.run() for _ in range(4)] == [3, 3, 3, 1]
    assert machine.rows() == {"a": {"phi1": "failed", "torch": "ok", "bad": "ok", "good": "failed"}, "b": WHOLE,
                              "c": WHOLE | {"torch": "failed"}}
    assert "phi1 failed in 1 of 3 cases" in capsys.readouterr().err


def test_the_operation_that_only_widens_the_limits_is_named_too(machine):
    machine.deadly = {("b", "torch")}
    assert machine.run("--peers", "good") == 3
    assert read(machine.path)["lost"][0][:2] == ["b", "torch"]
    assert machine.run("--peers", "good") == 0
    assert ("b", "torch") not in machine.ran
    assert machine.rows()["b"] == {"phi1": "ok", "good": "ok"}


@pytest.mark.parametrize("change", ["settings", "commit"])
def test_another_run_takes_nothing_from_the_file(machine, change):
    assert machine.run() == 3
    if change == "commit":
        content = json.loads(machine.path.read_text())
        content["environment"]["commit"] = "0123456"
        machine.path.write_text(json.dumps(content))
    machine.deadly = set()
    assert machine.run(*(["--peers", "torch", "bad", "good"] if change == "settings" else [])) == 0
    assert set(machine.ran) == {(case, peer) for case in "abc" for peer in WHOLE}
    assert machine.rows() == {"a": WHOLE, "b": WHOLE, "c": WHOLE}
    assert "lost" not in read(machine.path)


def test_cases_that_a_lost_gpu_has_cut_short_come_last(machine, capsys):
    assert machine.run() == 3
    assert main(["bench", "--list", "--device", "cpu", "--last", str(machine.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[-3:]] == ["c", "a", "b"]


def test_who_lost_the_gpu_in_the_last_file_does_not_run_in_another(machine, tmp_path):
    assert machine.run() == 3
    last, machine.path = machine.path, tmp_path / "all.json"
    assert machine.run("--last", str(last)) == 0
    assert ("b", "bad") not in machine.ran
    assert machine.rows() == {"c": WHOLE, "a": WHOLE, "b": WHOLE | {"bad": "failed"}}


def test_without_a_file_the_line_says_how_to_go_on(machine, capsys):
    assert main(["bench", "--device", "cpu", "--quick", "--seconds", "0.01"]) == cli.LOST == 3
    assert "with --json FILE the same command goes on without bad there" in capsys.readouterr().err
