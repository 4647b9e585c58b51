"""The facts that numbers depend on: device, driver, versions, commit. They need neither git nor a GPU."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from phi1.bench.harness.providers import VERSIONS, installed_version

ROOT = Path(__file__).resolve().parents[2]
COMMIT_VARIABLE = "PHI1_COMMIT"


def environment(device: str) -> dict[str, Any]:
    """The facts that go with every results file.

    Args:
        device: "cpu" or "cuda", where the cases ran.
    """
    import torch

    facts: dict[str, Any] = {
        "device": device, "cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__,
        "triton": installed_version("triton") or "not installed", "commit": commit(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "peers": {name: installed_version(name) or f"not installed ({meant} is meant)"
                  for name, meant in VERSIONS.items()},
    }
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        facts |= {"gpu": about.name, "gpu_memory_gb": round(about.total_memory / 1e9, 1), "driver": driver(),
                  "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
                  "compute_capability": f"{about.major}.{about.minor}", "sm_count": about.multi_processor_count}
    return facts


def cpu_name() -> str:
    """The processor's model."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def driver() -> str:
    """Version of the GPU's kernel driver, or "unknown"."""
    for path, pattern in (("/proc/driver/nvidia/version", r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)"),
                          ("/sys/module/amdgpu/version", r"(\S+)")):
        try:
            found = re.search(pattern, Path(path).read_text())
        except OSError:
            continue
        if found:
            return found[1]
    return "unknown"


def commit() -> str:
    """Short hash of the source's commit, with + where the sources differ from it; $PHI1_COMMIT goes before git."""
    given = os.environ.get(COMMIT_VARIABLE)
    if given:
        return given
    # The repository may be another one, around the installation.
    own = _git("ls-files", "--error-unmatch", "bench/harness/environment.py")
    head = _git("rev-parse", "--short", "HEAD")
    if not own or not head:
        return "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.json", ":!bench/results")
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def device_name(facts: dict[str, Any]) -> str:
    """The device of some results: "NVIDIA H100 80GB HBM3", "AMD EPYC, 2 cores"."""
    return facts["gpu"] if facts["device"] == "cuda" else f"{facts['cpu']}, {facts['cores']} cores"


def about(facts: dict[str, Any]) -> str:
    """One line on the device, the versions and the commit of some results."""
    driver, threads = f"driver {facts.get('driver', 'unknown')}", f"PyTorch threads: {facts.get('threads')}"
    where = f"{device_name(facts)}, {driver if facts['device'] == 'cuda' else threads}"
    return f"{where}, torch {facts['torch']}, Triton {facts['triton']}, commit {facts['commit']}"


def machine_name(facts: dict[str, Any]) -> str:
    """The folder of a machine's results: "nvidia-h100-80gb-hbm3", "cpu-amd-epyc-2c"."""
    name = facts["gpu"] if facts["device"] == "cuda" else f"cpu-{facts['cpu']}-{facts['cores']}c"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
