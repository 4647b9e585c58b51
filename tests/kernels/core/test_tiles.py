"""Which rows of the tile tables a GPU takes."""

from types import SimpleNamespace

import pytest
import torch

from phi1.kernels.core import tiles


# Compute capability, and KiB of shared memory that a program may have (CUDA programming guide).
@pytest.mark.parametrize(("capability", "shared", "arch"), [
    ((7, 5), 64, "any"), ((8, 0), 163, "sm_80"), ((8, 6), 99, "any"), ((8, 7), 163, "sm_80"), ((8, 9), 99, "any"),
    ((9, 0), 227, "sm_90"), ((10, 0), 227, "sm_100"), ((10, 1), 227, "sm_100"), ((10, 3), 227, "sm_100"),
    ((11, 0), 227, "sm_100"), ((12, 0), 99, "any"), ((12, 1), 99, "any"), ((13, 0), 227, "sm_100"),
])
def test_a_gpu_takes_the_rows_of_the_nearest_architecture_whose_shared_memory_it_has(monkeypatch, capability, shared,
                                                                                     arch):
    gpu = SimpleNamespace(major=capability[0], minor=capability[1], shared_memory_per_block_optin=shared * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.version, "hip", None)
    assert tiles.architecture.__wrapped__(torch.device("cuda")) == arch


@pytest.mark.parametrize(("name", "arch"), [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx90a", "gfx942"),
                                            ("gfx950", "gfx942"), ("gfx1100", "any")])
def test_an_amd_gpu_takes_the_rows_of_its_family(monkeypatch, name, arch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert tiles.architecture.__wrapped__(torch.device("cuda")) == arch


def test_a_cpu_takes_the_rows_for_any_gpu_and_a_gpus_file_is_named_after_it():
    assert tiles.architecture(torch.device("cpu")) == "any"
    assert tiles.gpu_file("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
