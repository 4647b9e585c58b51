"""Every public function refuses every kind of wrong argument in one line that names the function."""

import re
import warnings

from wrong_calls import campaign, model_calls, operations

import phi1
from phi1 import kernels


def test_two_thousand_wrong_calls_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about sparse and quantized tensors
        assert campaign(tmp_path, seed=0, calls=2000) == []


def test_every_public_name_is_called(tmp_path):
    called = [call.names for call in [*operations(), *model_calls(tmp_path)]]
    without_arguments = {"PRESETS", "patch_transformers", "unpatch_transformers", "register_attention"}
    names = {*kernels.__all__, *phi1.__all__} - without_arguments
    assert [name for name in names
            if not any(re.fullmatch(pattern, full) for pattern in called for full in (name, f"phi1.{name}"))] == []
