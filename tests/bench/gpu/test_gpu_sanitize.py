"""bench/gpu/sanitize.py launches every kernel, so that compute-sanitizer sees each of them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phi1.bench.gpu.sanitize import chosen, inputs_of
from phi1.bench.harness.counting import counting, run_inside

KERNELS = Path(__file__).parents[3] / "kernels"


def launched(case, arch, dtype):
    """Names of the kernels that a case launches, found on tensors without values."""
    meta = torch.device("meta")
    with counting(arch) as counter:
        run_inside(replace(case, inputs=lambda draw: inputs_of(case, meta, dtype)))
    return {launch.name for launch in counter.launches}


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_every_kernel_is_launched(arch):
    kernels = {name for path in KERNELS.rglob("*.py") for name in re.findall(r"(\w+_kernel)\[", path.read_text())}
    assert {"in_proj_kernel", "branch_gradients_kernel", "attention_backward_dq_kernel"} <= kernels
    found = {dtype: set().union(*(launched(case, arch, dtype) for case in chosen(dtype)))
             for dtype in (torch.float32, torch.float16)}
    assert kernels <= found[torch.float16]
    assert {"rotary_kernel", "attention_forward_kernel", "layer_norm_backward_kernel"} <= found[torch.float32]
