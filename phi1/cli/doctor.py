"""The checks of `phi1 doctor`: versions, device, kernels, memory and disk. Each check runs what it reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PHI1_BYTES = 2 * 1_418_270_720  # phi-1 in float16


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: str  # "ok", "note" or "FAIL"
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.status:<5} {self.subject:<16} {self.text}"


def examine() -> Iterator[Finding]:
    """Run the checks and yield each finding at once. A check that raises becomes a FAIL with its reason."""
    yield Finding("ok", "phi1", f"{importlib.metadata.version('phi1')} in {Path(__file__).parents[1]}")
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    yield from _packages()
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "processor": _processor, "device": _device, "layer_norm": _layer_norm, "model": _model, "memory": _memory,
        "disk": _disk,
    }
    for subject, check in checks.items():
        try:
            yield from check()
        except Exception as error:  # the report goes on, whatever is broken
            reason = " ".join(str(error).split())
            yield Finding("FAIL", subject, f"{type(error).__name__}: {reason}")


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires("phi1") or []:
        need = Requirement(line)
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("FAIL", need.name, f"not installed; phi1 needs {need.specifier}")
            continue
        fits = need.specifier.contains(version, prereleases=True)
        yield Finding("ok" if fits else "FAIL", need.name, f"{version} (needs {need.specifier})")


def _processor() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("ok", "processor", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {cores} cores, "
                                     f"{torch.get_num_threads()} PyTorch threads")


def _device() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("note", "device", "no CUDA device: operations run on the CPU as PyTorch code, not in Triton")
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        status = "ok" if free > PHI1_BYTES else "note"
        yield Finding(status, f"cuda:{i}", f"{about.name}, compute capability {about.major}.{about.minor}, "
                                           f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free")


def _layer_norm() -> Iterator[Finding]:
    """Run layer_norm on the default device of models. On CUDA that compiles and launches a Triton kernel."""
    import torch

    from phi1.kernels import layer_norm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(device) for shape in ((64, 256), (256,), (256,)))
    exact = torch.nn.functional.layer_norm(x.double(), (256,), weight.double(), bias.double())
    error = (layer_norm(x, weight, bias).double() - exact).abs().max().item()
    where = "Triton kernel on CUDA" if device == "cuda" else "PyTorch code on the CPU"
    yield Finding("ok" if error < 1e-5 else "FAIL", "layer_norm", f"{where}, largest error {error:.1e} against float64")


def _model() -> Iterator[Finding]:
    """Run one forward and backward of a tiny model."""
    import torch

    from phi1.config import preset
    from phi1.model import Phi1

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Phi1(preset("nano", vocab_size=512, num_hidden_layers=1), device=device)
    ids = torch.arange(128, device=device).reshape(2, 64)
    loss = model.loss(ids, ids + 1)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    finite = all(grad is not None and bool(grad.isfinite().all()) for grad in gradients)
    # With weights of standard deviation 0.02 the prediction is nearly uniform, so the loss is nearly log 512.
    near = abs(loss.item() - torch.tensor(512.0).log().item()) < 0.5
    yield Finding("ok" if finite and near else "FAIL", "model",
                  f"forward and backward on {device}: loss {loss.item():.3f} (uniform 6.238), gradients "
                  f"{'finite' if finite else 'NOT finite'}")


def _memory() -> Iterator[Finding]:
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    free, total = (int(fields[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    short = free < 1.5 * PHI1_BYTES
    yield Finding("note" if short else "ok", "memory", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB available"
                  + (f"; phi-1 in float16 needs about {1.5 * PHI1_BYTES / 1e9:.1f}" if short else ""))


def _disk() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for subject, folder in (("disk, here", Path.cwd()), ("disk, Hub cache", Path(HF_HUB_CACHE)),
                            ("disk, temporary", Path(tempfile.gettempdir()))):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        short = free < 1.2 * PHI1_BYTES
        writable = os.access(existing, os.W_OK)
        yield Finding("note" if short or not writable else "ok", subject,
                      f"{free / 1e9:.1f} GB free in {folder}" + ("" if writable else ", which is not writable")
                      + (f"; phi-1 in float16 is {PHI1_BYTES / 1e9:.1f} GB" if short else ""))
