"""A small benchmark case: a vector is doubled."""

from phi1.bench.harness.case import Case
from phi1.bench.harness.providers import ours


def double(inputs):
    return 2 * inputs["x"]


def make(*peers, function=double, **fields):
    """The case with phi1's function, its peers and other fields."""
    given = {"name": "double N=64", "direction": "forward", "leaves": ("x",), "reference": double} | fields
    return Case(op="double", unit="kernel", shape={"N": 64}, dtype="float32", devices=("cpu",), bytes="2*N*e",
                flops="N", inputs=lambda draw: {"x": draw.normal(64)}, providers=(ours(function), *peers), **given)
