"""The surroundings on which bits depend: which variables count, and how a difference is told."""

import os

import pytest
import torch

from phi1.train.run.resume import check_bitwise
from phi1.train.runtime.engine import Engine
from phi1.train.runtime.environment import differences, libraries, settings, variables
from phi1.train.runtime.launch import RunError


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "DNNL_DEFAULT_FPMATH_MODE", "ATEN_CPU_CAPABILITY", "MKL_CBWR",
                                  "OMP_SCHEDULE", "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "NCCL_ALGO",
                                  "NCCL_PROTO", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"])
def test_a_variable_that_may_change_bits_is_named_by_a_bitwise_resume(tmp_path, monkeypatch, name):
    def now():
        return Engine(torch.device("cpu"), "fp32", 1, 1).environment()

    monkeypatch.delenv(name, raising=False)
    before = {"environment": now(), "usual_loss": 1.0}
    check_bitwise(tmp_path, before, now())
    monkeypatch.setenv(name, "1")
    with pytest.raises(RunError, match=f"cannot go on bit for bit here: {name} was unset, is 1; give what it was"):
        check_bitwise(tmp_path, before, now())


@pytest.mark.parametrize("name", ["NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_SOCKET_IFNAME", "ONEDNN_VERBOSE",
                                  "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PLACES", "PATH"])
def test_a_variable_that_cannot_change_bits_is_left_out(monkeypatch, name):
    monkeypatch.setitem(os.environ, name, "1")
    assert name not in variables()


def test_settings_and_libraries_are_those_of_this_pytorch():
    before = settings()
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction ^= True
    try:
        assert set(differences(before, settings())) == {"fp16_reduced_precision_reduction"}
    finally:
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction ^= True
    built = torch.__config__.show()
    assert libraries() or "MKL" not in built
    assert all(version in built for name, version in libraries().items() if name in ("MKL-DNN", "OpenMP"))


def test_what_an_older_checkpoint_did_not_record_is_named_once(tmp_path):
    environment = Engine(torch.device("cpu"), "fp32", 1, 1).environment()
    older = {key: environment[key] for key in environment if key not in ("settings", "variables")} | {"threads": 2}
    with pytest.raises(RunError, match="here: threads was 2, is 1; settings, variables not recorded; give what"):
        check_bitwise(tmp_path, {"environment": older, "usual_loss": 1.0}, environment)
