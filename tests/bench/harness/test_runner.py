"""The runner of cases: the checks before a time counts, and peers that are absent, fail or break later."""

import pytest
import torch
from double_case import double, make

from phi1.bench.harness import check, runner, timing
from phi1.bench.harness.case import Provider
from phi1.bench.harness.providers import VERSIONS, compiled, peer, plain
from phi1.bench.harness.roof import Roof
from phi1.bench.harness.runner import Runner

CPU = torch.device("cpu")


def run(case, **options):
    record = Runner(CPU, seconds=0.02, quick=True, **options).run(case)
    return record, {entry["provider"]: entry for entry in record["providers"]}


def test_a_record_has_times_ratios_errors_and_the_roof():
    record, entries = run(make(plain("torch", double)))
    entry = entries["torch"]
    assert list(entries) == ["phi1", "torch"]
    assert entry["status"] == "ok"
    low, high = entry["ms"][1:]
    assert 0 < low <= entry["ms"][0] <= high
    assert entry["ratio"][1] <= entry["ratio"][0] <= entry["ratio"][2]
    assert entries["phi1"]["ratio"] == [1, 1, 1]
    assert entry["error"] == 0 == record["eager_error"]
    assert record["bytes"] == 512
    assert record["roof"]["ms"] == pytest.approx(512 / record["roof"]["gb_per_s"] / 1e6, rel=1e-3)
    assert entry["roof_share"] == pytest.approx(record["roof"]["ms"] / entry["ms"][0], rel=1e-2)
    assert record["input_copies"] >= 2


@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
@pytest.mark.parametrize("factor", [2.001, float("nan")])
def test_a_wrong_result_is_refused(direction, factor):
    _, entries = run(make(plain("torch", double), function=lambda inputs: factor * inputs["x"],
                          direction=direction))
    assert entries["phi1"]["status"] == "wrong"
    assert "is off by" in entries["phi1"]["reason"]
    assert entries["torch"]["status"] == "ok"
    assert "ratio" not in entries["torch"], "nothing is compared with a wrong time"


def test_a_wrong_gradient_is_refused():
    def broken(inputs):  # the right value, with twice the gradient
        x = inputs["x"]
        return 4 * x - 2 * x.detach()

    _, entries = run(make(plain("torch", double), function=broken, direction="forward+backward"))
    assert entries["phi1"]["status"] == "wrong"
    assert entries["phi1"]["worst"] == "dx"


def test_peers_may_be_ten_times_as_far_off_and_no_more():
    def off(by):
        return lambda inputs: 2 * inputs["x"] * (1 + by)

    eps = torch.finfo(torch.float32).eps
    _, entries = run(make(plain("near", off(8 * eps)), plain("far", off(80 * eps))))
    assert entries["near"]["status"] == "ok"
    assert entries["far"]["status"] == "wrong"


@pytest.mark.parametrize("peers", [None, []], ids=["with torch", "without"])
def test_pytorchs_own_errors_widen_the_limits_whether_it_runs_or_not(peers):
    def off(by):
        return plain("torch", lambda inputs: 2 * inputs["x"] * (1 + by))

    eps = torch.finfo(torch.float32).eps
    ours = {"function": lambda inputs: 2 * inputs["x"] * (1 + 8 * eps)}
    assert run(make(off(8 * eps), **ours), peers=peers)[1]["phi1"]["status"] == "ok"
    assert run(make(off(0), **ours), peers=peers)[1]["phi1"]["status"] == "wrong"
    assert run(make(**ours), peers=peers)[1]["phi1"]["status"] == "wrong"
    assert run(make(plain("torch", lambda inputs: 1 / 0), **ours), peers=peers)[1]["phi1"]["status"] == "wrong"


def test_peers_that_fail_or_are_absent_are_rows_with_a_reason(monkeypatch):
    def load(case):
        raise ImportError("no such symbol\nand a second line")

    def breaks(inputs):
        raise RuntimeError("out of luck")

    monkeypatch.setitem(VERSIONS, "no-such-package", "1.2.3")
    _, entries = run(make(peer("import", "torch", load, ("cpu",)), plain("run", breaks),
                          peer("absent", "no-such-package", load, ("cpu",)), plain("torch", double)))
    assert entries["import"]["status"] == "failed"
    assert entries["import"]["reason"] == "ImportError: no such symbol"
    assert entries["run"]["reason"] == "RuntimeError: out of luck"
    assert entries["absent"]["status"] == "not installed"
    assert entries["absent"]["reason"] == "no-such-package 1.2.3 is not installed"
    assert entries["torch"]["ratio"]


@pytest.mark.parametrize("last", [0, 1, 4], ids=["as it warms up", "as its time is guessed", "between rounds"])
def test_a_peer_that_breaks_later_is_reported(last, monkeypatch):
    monkeypatch.setattr(timing, "SHORTEST_SAMPLE", 0.0)  # one call a round
    calls = iter(range(1 << 30))

    def breaks_later(inputs):
        if next(calls) > last:
            raise RuntimeError("once too often")
        return double(inputs)

    _, entries = run(make(plain("torch", breaks_later)))
    assert entries["torch"]["status"] == "failed"
    assert entries["torch"]["reason"] == "RuntimeError: once too often"
    assert "ms" not in entries["torch"]
    assert entries["phi1"]["status"] == "ok"


def test_the_selection_of_peers():
    case = make(plain("torch", double), *compiled(double), peer("cuda only", "torch", lambda case: double))
    assert list(run(case)[1]) == ["phi1", "torch"], "compiling is not done on a CPU unless asked for"
    slow = make(Provider("slow", lambda case, device: double, slow=True))
    assert list(run(slow)[1]) == ["phi1"], "the short selection"
    assert list(run(slow, peers=["slow"])[1]) == ["phi1", "slow"]
    assert list(run(case, peers=[])[1]) == ["phi1"]
    assert list(run(case, peers=["torch"])[1]) == ["phi1", "torch"]


@pytest.mark.slow  # torch.compile calls the C++ compiler
def test_a_compiled_backward_is_timed_on_a_graph_that_is_kept():
    def norm(inputs):  # its backward has statistics whose memory it could reuse
        return torch.nn.functional.layer_norm(inputs["x"], (64,))

    _, entries = run(make(*compiled(norm), function=norm, reference=norm, direction="backward"), peers=["compile"])
    assert entries["compile"]["status"] == "ok", entries["compile"]["reason"]


def test_random_numbers_of_ones_own_are_not_compared():
    _, entries = run(make(plain("torch", lambda inputs: torch.rand(64), comparable=False)))
    assert entries["torch"]["status"] == "ok"
    assert "error" not in entries["torch"]


def test_a_reference_that_does_not_fit_is_said():
    def too_large(inputs):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    record, entries = run(make(plain("torch", double), reference=too_large))
    assert "unchecked" in record["note"]
    assert "1 TiB" in record["note"]
    assert "eager_error" not in record
    assert entries["phi1"]["status"] == "ok"


def test_exclusive_providers_are_held_one_at_a_time():
    alive, most = set(), []

    class Held:
        def __init__(self, name):
            self.name = name
            alive.add(name)
            most.append(len(alive))

        def __call__(self, inputs):
            return double(inputs)

        def __del__(self):
            alive.discard(self.name)

    def held(name):
        return Provider(name, lambda case, device: Held(name))

    _, entries = run(make(held("a"), held("b"), exclusive=True))
    assert {entry["status"] for entry in entries.values()} == {"ok"}
    assert max(most) == 1


def test_inputs_rotate(monkeypatch):
    monkeypatch.setattr(runner, "cache_bytes", lambda device: 64 * 4)
    seen = set()

    def remember(inputs):
        seen.add(inputs["x"].data_ptr())
        return double(inputs)

    record, _ = run(make(function=remember))
    assert record["input_copies"] == 3, "three times the cache"
    assert len(seen) >= 3


def test_a_lost_device_ends_the_run(monkeypatch):
    def gone():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(runner.DeviceLostError, match="illegal memory access"):
        runner.still_there(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "empty_cache", gone)  # which meets the error first
    with pytest.raises(runner.DeviceLostError, match="illegal memory access"):
        runner.still_there(torch.device("cuda"))


def test_the_roof_of_a_case():
    case = make()
    assert Roof(gb_per_s=512, tflop_per_s=1).ms(case) == pytest.approx(1e-6)
    assert Roof(gb_per_s=512, tflop_per_s=1).memory_bound(case)
    assert not Roof(gb_per_s=512, tflop_per_s=1e-9).memory_bound(case)


def test_results_are_named_and_complete():
    case = make(direction="forward+backward")
    inputs = {"x": torch.ones(64)}
    named = check.results(case, double, inputs)
    assert set(named) == {"out0", "dx"}
    with pytest.raises(AssertionError, match="shape"):
        check.Exact(make(), inputs).judge(lambda inputs: double(inputs)[:32], "phi1")
