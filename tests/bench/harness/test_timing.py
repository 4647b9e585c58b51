"""Both clocks and the quantiles."""

import time

import pytest

from phi1.bench.harness.timing import CpuClock, CudaClock, quantile, spread


class FakeCuda:
    """torch.cuda's clock: the device takes a given time for each call, and the host is where the test says."""

    def __init__(self):
        self.now, self.spun, self.syncs = 0.0, 0.0, 0

    def synchronize(self):
        self.syncs += 1

    def _sleep(self, cycles):
        self.spun += cycles

    def Event(self, enable_timing):
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda):
        self.cuda, self.at = cuda, None

    def record(self):
        self.at = self.cuda.now

    def elapsed_time(self, end):
        return end.at - self.at


def test_the_cuda_clock_times_each_call_between_its_events():
    cuda, numbers = FakeCuda(), []

    def call(number):
        numbers.append(number)
        cuda.now += 0.5 + number

    clock = CudaClock(hide_host=True, cuda=cuda)
    clock.prepare(call)
    assert numbers == [0, 1, 2, 3]
    assert clock.sample(call, 5) == pytest.approx([0.5 + number for number in range(5, 5 + len(numbers) - 4)])
    assert 2 <= len(numbers) - 4 <= 10
    assert cuda.spun > 0, "the host queues behind a spin"
    assert cuda.syncs >= 3


def test_the_cuda_clock_queues_slow_hosts_in_small_batches_and_spins_long_enough():
    cuda = FakeCuda()

    def call(number):
        time.sleep(0.003)  # some 600 launches

    clock = CudaClock(hide_host=True, cuda=cuda)
    clock.prepare(call)
    assert len(clock.sample(call, 0)) == 2
    assert cuda.spun / 2e9 >= 2 * 0.003
    assert clock.host_ms(call) >= 3


def test_the_cuda_clock_can_count_the_host_in():
    cuda = FakeCuda()
    clock = CudaClock(hide_host=False, cuda=cuda)

    def call(number):
        time.sleep(0.004)

    clock.prepare(call)
    (ms,) = clock.sample(call, 0)
    assert ms >= 4
    assert cuda.spun == 0


def test_the_cpu_clock_repeats_short_calls():
    numbers = []
    clock = CpuClock()
    clock.prepare(numbers.append)
    numbers.clear()
    (ms,) = clock.sample(numbers.append, 7)
    assert len(numbers) > 1
    assert numbers == list(range(7, 7 + len(numbers)))
    assert ms < 1, "milliseconds a call, not a round"


def test_quantiles():
    assert quantile([3, 1, 2], 0.5) == 2
    assert spread([float(i) for i in range(11)]) == [5.0, 2.0, 8.0]
