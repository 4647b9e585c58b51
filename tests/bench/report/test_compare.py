"""`phi1 bench compare`: changes beyond noise, in the units of each kind of device."""

import pytest
from bench_results import content, entry, record

from phi1.bench.report import compare


def test_compare_finds_what_moved_beyond_noise():
    a = content(record(ms=1.0), record(case="same", ms=1.0), record(case="worse", ms=1.0), record(case="gone"))
    b = content(record(ms=0.8), record(case="same", ms=1.05), record(case="worse", ms=1.2), record(case="new"))
    found = {change.case: change.verdict for change in compare.changes(a, b)}
    # Each has p80 3 % above its median: 3 % + 3 % + the floor of 1 %.
    assert found == {record()["case"]: "faster", "same": "", "worse": "slower"}


def within(before, after):
    """The verdict on two times, each (median, p20, p80)."""
    a, b = content(record()), content(record())
    for each, ms in ((a, before), (b, after)):
        each["cases"][0]["providers"][0]["ms"] = list(ms)
    (change,) = compare.changes(a, b)
    return change.verdict


def test_two_times_differ_if_they_do_by_more_than_both_noises_and_the_floor():
    """The noise of a time is the further of its p20 and p80 from its median; a GPU's floor is 1 %."""
    quiet, low, high = (100, 100, 100), (100, 96, 101), (100, 99, 103)
    assert within(quiet, (100.9, 100.9, 100.9)) == ""
    assert within(quiet, (101.2, 101.2, 101.2)) == "slower"
    assert within((101.2, 101.2, 101.2), quiet) == "faster"
    assert within(low, (104.5, 104.5, 104.5)) == ""  # 4 % and 1 %
    assert within(low, (105.5, 105.5, 105.5)) == "slower"
    assert within(high, (103.5, 103.5, 103.5)) == ""  # 3 % and 1 %
    assert within(high, (104.5, 104.5, 104.5)) == "slower"
    assert within(low, (108, 108 * 0.97, 108)) == ""  # 4 %, 3 % and 1 %: log 1.08 is 0.077
    assert within(low, (109, 109 * 0.97, 109)) == "slower"
    assert within((109, 109 * 0.97, 109), low) == "faster"


def test_compare_takes_the_ratio_to_a_peer_on_a_cpu():
    """The machine was twice as slow the second time, and phi1 beside its peer the same."""
    a, b = content(record(ms=1.0), device="cpu"), content(record(ms=2.0), device="cpu")
    (change,) = compare.changes(a, b)
    assert (change.unit, change.verdict) == ("x torch", "")
    assert change.before == pytest.approx(1 / 1.5)
    b["cases"][0]["providers"][1] = entry("torch", 2.0, 1.0)  # we take as long as the peer now
    (change,) = compare.changes(a, b)
    assert change.verdict == "slower"


def test_compare_without_a_peer_takes_the_roof_of_the_same_rounds():
    a, b = content(record(ms=1.0), device="cpu"), content(record(ms=2.0), device="cpu")
    for each in (a, b):
        del each["cases"][0]["providers"][1:]
    b["cases"][0]["roof"]["ms"] *= 2
    (change,) = compare.changes(a, b)
    assert (change.unit, change.verdict) == ("x roof", "")


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (content(record(), gpu="NVIDIA A100"), "different devices say nothing"),
        (content(record(case="else")), "no case in common"),
    ],
)
def test_compare_refuses_what_does_not_compare(other, complaint):
    with pytest.raises(ValueError, match=complaint):
        compare.changes(content(record()), other)


def test_wrong_results_do_not_compare():
    a, b = content(record()), content(record())
    b["cases"][0]["providers"][0]["status"] = "wrong"
    assert compare.changes(a, b) == []
