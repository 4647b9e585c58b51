"""Rules that all operations share: the backend, when values are checked, the messages, the table of tiles."""

import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from kernel_checks import assert_matches_reference, assert_within_bound, empty_is_nan

from phi1.kernels import Dropout, backend, check_values
from phi1.kernels.core import tiles
from phi1.kernels.core.backend import reference_forced, use_triton
from phi1.kernels.core.checks import (
    check_flag,
    check_range,
    check_real,
    check_whole,
    values_checked,
)
from phi1.kernels.core.philox import check_dropout

ON_CPU = torch.zeros(3, dtype=torch.int64)


def test_backend_nests_and_is_restored_after_an_error():
    assert not reference_forced()
    with backend("reference"):
        with pytest.raises(KeyError), backend("reference"):
            raise KeyError
        assert reference_forced()
    assert not reference_forced()
    assert not use_triton(ON_CPU)


def test_backend_rejects_other_names():
    with pytest.raises(ValueError, match="backend: name must be one of triton, reference; got 'cuda'"), backend("cuda"):
        pass


def test_triton_is_not_asked_of_a_device_that_cannot(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with backend("triton"):
        assert use_triton(ON_CPU)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match=r"backend\('triton'\): tensors must be .*got a tensor on cpu"):
            use_triton(ON_CPU)


def test_values_are_checked_on_a_cpu_unless_turned_off():
    assert values_checked(ON_CPU)
    with check_values(False):
        assert not values_checked(ON_CPU)
        with check_values(True):
            assert values_checked(ON_CPU)
        assert not values_checked(ON_CPU)
    assert not values_checked(torch.zeros(3, device="meta"))


def test_values_are_not_checked_while_tracing():
    def checked(x):
        check_range("op", "x", x, 0, 1, "always")
        return x + 1

    compiled = torch.compile(checked, fullgraph=True, backend="aot_eager")
    assert compiled(torch.tensor([5])).tolist() == [6]
    with pytest.raises(ValueError, match="x must be"):
        checked(torch.tensor([5]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_values_on_a_gpu_are_checked_only_on_request():
    x = ON_CPU.cuda()
    assert not values_checked(x)
    with check_values(True):
        assert values_checked(x)


@pytest.mark.parametrize(
    ("check", "value", "error", "message"),
    [
        (check_flag, 1, TypeError, "op: x must be True or False; got 1"),
        (check_flag, torch.tensor(True), TypeError, r"op: x must be True or False; got a tensor of shape \[\]"),
        (check_whole, True, TypeError, "op: x must be a whole number; got True"),
        (check_whole, torch.tensor(2), TypeError, "op: x must be a whole number; got a tensor"),
        (check_whole, 2**63, ValueError, f"op: x must fit in 64 bits; got {2**63}"),
        (check_whole, -(10**5000), ValueError, "op: x must fit in 64 bits; got a number of 16610 bits"),
        (check_real, False, TypeError, "op: x must be a number; got False"),
        (check_real, -(10**5000), ValueError, "op: x must be finite; got a number of 16610 bits"),
        (check_real, Decimal("-Infinity"), ValueError, "op: x must be finite"),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),  # not str(): of 5,001 digits it raises
)
def test_flags_and_numbers_are_told_apart(check, value, error, message):
    with pytest.raises(error, match=f"^{message}"):
        check("op", x=value)


def test_check_values_takes_a_flag():
    with pytest.raises(TypeError, match="check_values: enabled must be True or False; got 'no'"), check_values("no"):
        pass


def test_numbers_of_any_type_pass():
    check_whole("op", most=2**63 - 1, least=-(2**63), x=np.int32(3))
    check_real("op", largest=int(sys.float_info.max), x=np.float16(0.5), y=Fraction(1, 3))


def test_numbers_are_checked_while_tracing():
    def scaled(x, factor, n):
        check_real("op", factor=factor)
        check_whole("op", n=n)
        return x * factor + n

    compiled = torch.compile(scaled, fullgraph=True, dynamic=True, backend="aot_eager")
    assert compiled(torch.ones(1), 1.5, 3).tolist() == [4.5]
    assert compiled(torch.ones(1), 2.5, 4).tolist() == [6.5]


def test_check_range_names_the_first_bad_value():
    x = torch.tensor([[1, 2], [7, -100]])
    with pytest.raises(ValueError, match=r"op: ids must be at least 0 and less than 5, V; got 7 at \[1, 0\]"):
        check_range("op", "ids", x, 0, 5, "V")
    with pytest.raises(ValueError, match=r"less than 9 or -1, V; got -100 at \[1, 1\]"):
        check_range("op", "ids", x, 0, 9, "V", also=-1)
    check_range("op", "ids", x, 0, 9, "V", also=-100)
    check_range("op", "ids", x[:0], 0, 1, "V")


@pytest.mark.parametrize(
    ("dropout", "samples", "error", "message"),
    [
        (0.1, None, TypeError, r"op: dropout must be a phi1.kernels.Dropout or None; got float"),
        (Dropout(0.1, torch.zeros(2, dtype=torch.int64, device="meta")), None, ValueError,
         r"op: dropout.rng must be on x's device \(cpu\); got meta"),
        (Dropout(0.1, ON_CPU[:2], torch.arange(4)), None, ValueError,
         r"op: dropout.sample_ids must divide the 6 rows of x evenly; got 4 sample ids"),
        (Dropout(0.1, ON_CPU[:2], torch.arange(0)), None, ValueError, r"evenly; got 0 sample ids"),
        (Dropout(0.1, ON_CPU[:2], torch.arange(3)), 2, ValueError,
         r"op: dropout.sample_ids.shape must be \(2,\), one per sample; got \(3,\)"),
    ],
)
def test_check_dropout(dropout, samples, error, message):
    with pytest.raises(error, match=message):
        check_dropout("op", dropout, torch.zeros(6, 8), samples)


def test_what_was_measured_goes_first_then_the_first_row_that_fits(monkeypatch):
    rows = [
        {"gpu": "sm_90", "when": {"width": [1, 4096], "dtype": "float16"}, "tile": {"rows": 4}},
        {"gpu": "any", "when": {"width": [1, 100]}, "tile": {"rows": 1}},
        {"gpu": "any", "when": {"width": [50, 4096]}, "tile": {"rows": 2}},
    ]
    measured = {"op": {"forward": [{"when": {"width": 2048, "dtype": "float16"}, "tile": {"rows": 9}}]}}
    monkeypatch.setattr(tiles, "table", lambda op: {"forward": rows})
    monkeypatch.setattr(tiles, "measured", lambda gpu: measured if gpu == "NVIDIA H100 80GB HBM3" else {})
    tiles.first_fit.cache_clear()

    def rows_of(width, gpu, arch, dtype="float16"):
        monkeypatch.setattr(tiles, "gpu_name", lambda device: gpu)
        monkeypatch.setattr(tiles, "architecture", lambda device: arch)
        return tiles.tile("op", "forward", torch.device("cuda"), width=width, dtype=dtype)["rows"]

    assert rows_of(2048, "NVIDIA H100 80GB HBM3", "sm_90") == 9
    assert rows_of(1024, "NVIDIA H100 80GB HBM3", "sm_90") == 4
    assert rows_of(2048, "NVIDIA H200", "sm_90") == 4
    assert rows_of(2048, "NVIDIA H200", "sm_90", dtype="float32") == 2
    assert rows_of(2048, "NVIDIA A10", "any") == 2
    assert rows_of(75, "NVIDIA A10", "any") == 1
    assert tiles.tile_for("op", "forward", "sm_90", width=75, dtype="float16")["rows"] == 4
    with pytest.raises(NotImplementedError, match=r"op: no tile for the forward kernel at dtype float16, width 5000"):
        rows_of(5000, "NVIDIA A10", "any")
    tiles.first_fit.cache_clear()


def test_uninitialised_memory_is_nan_inside_the_context():
    with empty_is_nan():
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.tensor([1.0, 2.1]), r"x \[2\] torch.float32: max\|out - exact\| = 1.000e-01 .* at \[1\]: out 2.1"),
        (torch.tensor([1.0, float("nan")]), r"x .*nan is over the bound"),
        (torch.tensor([1.0, 2.0]).half(), r"x: dtype is torch.float16, the reference's torch.float32"),
        (torch.tensor([[1.0, 2.0]]), r"x: shape is \(1, 2\), the reference's \(2,\)"),
    ],
)
def test_the_tolerance_rule_refuses(out, message):
    eager = torch.tensor([1.0, 2.0])
    with pytest.raises(AssertionError, match=message):
        assert_within_bound(out, eager, eager.double(), "x")
    assert_within_bound(eager, eager, eager.double(), "x")
    # Twice eager's own error is allowed.
    assert_within_bound(torch.tensor([1.0, 2.1]), torch.tensor([1.0, 2.06]), eager.double(), "x")


def test_a_wrong_gradient_is_noticed():
    x = {"x": torch.randn(5, generator=torch.Generator().manual_seed(0))}
    assert_matches_reference(lambda x: x * 2, lambda x: x + x, x)
    with pytest.raises(AssertionError, match=r"dx \[5\]"):
        assert_matches_reference(lambda x: x * 2 + (x - x.detach()) * 0.01, lambda x: x * 2, x)
    with pytest.raises(AssertionError, match="y gets no gradient"):
        assert_matches_reference(lambda x, y: x * 2, lambda x, y: x * 2, x | {"y": x["x"]})
