"""`pytest --benchmark`: the registry's cases on this machine's device, each provider a benchmark in its case's group.

What a provider computes is checked before it is timed. pytest-benchmark times one provider after another; ratios that
mean something on a CPU come from `phi1 bench`, whose rounds alternate.
"""

from __future__ import annotations

import pytest
import torch

from phi1.bench.cases.registry import select
from phi1.bench.harness import check
from phi1.bench.harness.case import Case, Provider
from phi1.bench.harness.providers import installed_version, settings_for
from phi1.bench.harness.runner import bind, release

KIND = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(case, provider) for case in select(KIND, quick=True) for provider in case.providers
         if KIND in provider.devices and KIND in provider.by_default and not provider.slow]
ROUNDS, SECONDS = 5, 0.2


@pytest.fixture(autouse=True)
def end_of_process_group():
    yield
    if torch.distributed.is_initialized():  # by a training step
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("case", "provider"), CASES, ids=[f"{case.name}-{peer.name}" for case, peer in CASES])
def test_case(benchmark, case: Case, provider: Provider) -> None:
    if provider.package not in ("torch", "phi1") and installed_version(provider.package) is None:
        pytest.skip(f"{provider.package} is not installed")
    benchmark.group = case.name
    with settings_for(case):
        measure(benchmark, case, provider)


def measure(benchmark, case: Case, provider: Provider) -> None:
    device = torch.device(KIND)
    copies = [case.draw(device, seed) for seed in range(2)]
    torch._dynamo.reset()  # or what earlier cases compiled counts against torch's limit of recompiles
    function = provider.prepare(case, device)
    if case.reference is not None and provider.comparable:
        exact = check.Exact(case, copies[0])
        if yardstick := check.yardstick_of(case):
            exact.judge(yardstick.prepare(case, device), check.YARDSTICK)
        verdict = exact.judge(function, provider.name)
        assert not verdict.complaint, verdict.complaint
        benchmark.extra_info["error"] = verdict.error
        del exact
    call, turn = bind(case, function, copies), iter(range(1 << 30))

    def timed() -> None:
        call(next(turn))
        if KIND == "cuda":
            torch.cuda.synchronize()

    timed()
    benchmark.extra_info |= {"bytes": case.n_bytes, "flops": case.n_flops}
    benchmark.pedantic(timed, rounds=ROUNDS, iterations=iterations(benchmark, timed))
    release(device)


def iterations(benchmark, timed) -> int:
    """Calls a round, so that a round of a short call is longer than the clock's grain."""
    timer = benchmark._timer
    begin = timer()
    timed()
    return max(1, min(1000, int(SECONDS / ROUNDS / max(timer() - begin, 1e-7))))
