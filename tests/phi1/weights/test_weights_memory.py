"""Loading weights takes little more memory than the files: measured in a process of its own."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from phi1 import Phi1Config
from phi1.model import Phi1
from phi1.weights.huggingface import save_state_dict


def peak_over_size(folder):
    """Return the peak of resident memory while loading, less that of the imports, over the size of the weight files."""
    # VmHWM, because getrusage's peak would be this process's own, which the new one inherits.
    code = """
        import sys
        import phi1.weights.huggingface
        def status(name):
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
        before = status("VmRSS")
        model = phi1.weights.huggingface.load(sys.argv[1], device="cpu")
        print(status("VmHWM") - before)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(folder)], capture_output=True, text=True,
                         check=True, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return int(run.stdout) / sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".json")


# 330 MB: large beside the 64 MB window and the memory that imports leave behind.
LARGE = Phi1Config(vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12,
                   num_attention_heads=16)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_loading_peaks_below_one_and_a_half_files(tmp_path, kind):
    state = {name: torch.full(tensor.shape, 0.5, dtype=torch.float16)
             for name, tensor in Phi1(LARGE, device="meta").state_dict().items()}
    save_state_dict(state, LARGE, tmp_path / "model")
    if kind == "bin":
        torch.save(load_file(tmp_path / "model" / "model.safetensors"), tmp_path / "model" / "pytorch_model.bin")
        (tmp_path / "model" / "model.safetensors").unlink()
    assert peak_over_size(tmp_path / "model") <= 1.5
