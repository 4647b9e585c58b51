"""The package for Hugging Face's `kernels`, loaded beside phi1 and compared with it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from phi1 import kernels as ours
from phi1.integrations.hub_kernels import NAME, build

CASES = {
    "attention": lambda x: ((x.unflatten(2, (2, 8)),) * 3, {"causal": True}),
    "layer_norm": lambda x: ((x.flatten(0, 1), x[0, 0], x[0, 1]), {}),
    "add_layer_norm": lambda x: ((x.flatten(0, 1), x.flatten(0, 1), x[0, 0], x[0, 1]), {}),
    "linear_cross_entropy": lambda x: ((x.flatten(0, 1), x[0], None, torch.arange(10) % 5), {}),
    "rotary": lambda x: ((x.flatten(0, 1)[:, None, None], x[0, :, :4].detach().contiguous(),
                          x[1, :, :4].detach().contiguous(), torch.arange(10) % 5), {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("hub") / "out").parents[1]


@pytest.fixture(scope="module")
def package(folder):
    """The package, by `kernels` where it is installed, else as `kernels` imports it."""
    if importlib.util.find_spec("kernels"):
        from kernels import get_local_kernel

        return get_local_kernel(folder)
    place = folder / "build" / "torch-universal" / NAME / "__init__.py"
    spec = importlib.util.spec_from_file_location("phi1_kernels_alone", place)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_phi1(package, name):
    found = []
    for module in (ours, package):
        x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        positional, named = CASES[name](x)
        result = getattr(module, name)(*positional, **named)
        results = [one for one in (result if isinstance(result, tuple) else (result,)) if one is not None]
        sum(one.square().sum() for one in results).backward()
        found.append([*results, x.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert found[0][-1].abs().max() > 0
    assert getattr(package, name) is not getattr(ours, name)


@pytest.mark.slow
def test_it_runs_without_phi1_and_its_kernels_in_the_interpreter(folder, tmp_path):
    code = ("import sys; sys.modules['phi1'] = None; sys.path.insert(0, sys.argv[1])\n"
            f"import torch, {NAME} as package\n"
            "x, one = torch.randn(3, 16), torch.ones(16)\n"
            "plain = package.layer_norm(x, one, one)\n"
            "with package.backend('triton'): kernel = package.layer_norm(x, one, one)\n"
            "torch.testing.assert_close(kernel, plain)\n"
            "print(sorted(name for name in sys.modules if name.endswith('_triton')))")
    done = subprocess.run([sys.executable, "-c", code, folder / "build" / "torch-universal"], cwd=tmp_path, text=True,
                          capture_output=True, env={"TRITON_INTERPRET": "1", "PATH": "", "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert f"{NAME}.pointwise.layer_norm_triton" in done.stdout


def test_a_folder_with_files_is_refused(folder):
    with pytest.raises(ValueError, match=r"^hub_kernels: out must be a new or empty folder; .* is not$"):
        build(folder)
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: kernels\n")
    assert (folder / "LICENSE").read_bytes() == (Path(__file__).parents[3] / "LICENSE").read_bytes()
