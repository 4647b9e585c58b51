"""bench/gpu.sh on machines that have PyTorch, Triton, transformers and pytest, and nothing else of what phi1 needs."""

import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from phi1.bench.gpu import stages
from phi1.bench.gpu.commands import NEEDS, PYTEST

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "bench" / "gpu.sh"

if sys.platform != "linux":
    pytest.skip("the script is for Linux", allow_module_level=True)

BARE = ("torch", "triton", "transformers", "pytest", "pytest-benchmark", "pip", "phi1")
ONLY_INSTALLED = """
import importlib.machinery, re, sys

class Installed(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if path is None and name in {modules} else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        return (found for found in super().find_distributions(*context)
                if re.sub("[-_.]+", "-", found.metadata["Name"]).lower() not in {packages})

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Installed
"""


def installed():
    """Package -> what it always needs."""
    def plain(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    return {plain(found.metadata["Name"]): [plain(re.match(r"[\w.-]+", line)[0]) for line in found.requires or []
                                            if "extra" not in line]
            for found in importlib.metadata.distributions()}


def beside(kept):
    """All packages but the kept ones and what these need."""
    needs, left, waiting = installed(), set(), list(kept)
    while waiting:
        if (name := waiting.pop()) in needs and name not in left:
            left.add(name)
            waiting += needs[name] if name != "phi1" else []
    return set(needs) - left


def without(packages, folder):
    """A folder for PYTHONPATH on which the packages look as if they were not installed."""
    modules = {module for module, owners in importlib.metadata.packages_distributions().items()
               if {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} <= set(packages)}
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ONLY_INSTALLED.format(modules=modules, packages=set(packages)))
    return str(folder)


def gpu_sh(*arguments, **environment):
    variables = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=variables, timeout=280)


def make_wheel(folder, name, *needs):
    """A wheel of one empty module."""
    folder.mkdir(exist_ok=True)
    facts = f"{name}-9.0.dist-info"
    requires = "".join(f"Requires-Dist: {line}\n" for line in needs)
    with zipfile.ZipFile(folder / f"{name}-9.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n{requires}")
        wheel.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{facts}/RECORD", "")


@pytest.mark.slow
def test_training_is_rehearsed_and_no_stage_lacks_anything(tmp_path):
    gone = beside(BARE) | {"pydantic", "rich"}  # which some versions of what is kept bring
    assert {"datasets", "hypothesis", "tomli-w", "xxhash"} <= gone
    bare = without(gone, tmp_path / "bare")
    done = gpu_sh("--rehearse", "train", OUT=str(tmp_path / "out"), PYTHONPATH=bare)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "train" / "train.json").is_file()
    asked = subprocess.run([sys.executable, stages.__file__, "--needs", *NEEDS], capture_output=True, text=True,
                           env=os.environ | {"PYTHONPATH": bare})
    assert (asked.stdout, asked.returncode) == ("", 0), asked.stderr


def test_missing_packages_are_named_at_once(tmp_path, monkeypatch):
    """With what the one of which there is a wheel needs, but not what is there already or is for other machines."""
    make_wheel(tmp_path, "not_there", "Not_there.Either (>1)", "torch>=1", 'colorama; sys_platform == "win32"')
    (tmp_path / "third-9.0-py3-none-any.whl").write_text("cut short")
    monkeypatch.setitem(NEEDS, "tune", ("json", "third", "not_there"))
    assert stages.missing(["tune"]) == ["not-there", "third"]
    assert stages.missing(["tune"], tmp_path) == ["not-there", "third", "not-there-either"]


@pytest.mark.slow
def test_a_missing_package_is_taken_from_the_wheels_if_pip_takes_it(tmp_path):
    make_wheel(tmp_path / "wheels", "pytest_benchmark")
    (tmp_path / "wheels" / "transformers-9.0-py3-none-any.whl").write_text("cut short")
    done = gpu_sh("--rehearse", "check", "decode", OUT=str(tmp_path / "out"), WHEELS=str(tmp_path / "wheels"),
                  PYTHONPATH=without({"pytest-benchmark", "transformers"}, tmp_path / "bare"))
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "stage check decode needs Python packages that are missing: transformers; put their wheels for" in line
    assert f"; {tmp_path}/out/wheels.log says why pip took none from {tmp_path}/wheels" in line
    assert "transformers" in (tmp_path / "out" / "wheels.log").read_text()


TESTS = {
    "test_file.py": "import not_there\ndef test_it(): pass\n",
    "test_rest.py": """
import subprocess, sys
import pytest

@pytest.fixture
def made():
    import not_there.within

def test_fixture(made): pass

def test_inside():
    import also_not_there

def test_process():
    done = subprocess.run([sys.executable, "-c", "import not_there"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_right(): pass
""",
    "test_wrong.py": "import json.not_there\n",
}


def test_tests_without_their_packages_are_left_out_and_named(tmp_path, monkeypatch, capsys):
    for name, text in TESTS.items():
        (tmp_path / name).write_text(text)
    sound = stages.Command("sound", (*PYTEST, str(tmp_path / "test_file.py"), str(tmp_path / "test_rest.py")))
    wrong = stages.Command("wrong", (*PYTEST, str(tmp_path / "test_wrong.py")))
    monkeypatch.setattr(stages, "commands", lambda *_: [sound, wrong])
    assert stages.run_stage("check", tmp_path, rehearse=True) == 1
    table = capsys.readouterr().out.split("last line\n")[1].splitlines()
    assert [line.split()[:2] for line in (table[0], table[3])] == [["sound", "ok"], ["wrong", "exit"]]
    assert "1 passed, 4 skipped" in table[0]
    assert [line.strip() for line in table[1:3]] == [
        "left out, as also_not_there is not installed: 1 of test_rest.py",
        "left out, as not_there is not installed: test_file.py, 2 of test_rest.py"]


def test_a_relative_python_is_the_one_of_where_the_script_was_called(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$0 $*" >> "{tmp_path}/called"\ncase $1 in -c) exit 3;; esac\n')
    python.chmod(0o755)
    done = subprocess.run([SCRIPT, "--rehearse", "check"], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHON": "bin/python", "OUT": "out", "WHEELS": ""})
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "called").read_text().splitlines()
    assert [line.split()[0] for line in calls if line.startswith("/")] == 3 * [str(python)], "PyTorch? packages? stage"
    assert re.search(r"gpu/stages.py check --began 1\d{9} --out .*/out --rehearse$", calls[-1])
