"""Runs every test_*_kernels.py in Triton's interpreter: a process of its own, for TRITON_INTERPRET acts on import.

Each uses one core. Under `pytest -n` the workers take them one by one, as other tests; else as many as there are cores
run at once.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# Those that take longest first, as far as their sizes tell.
KERNEL_TESTS = sorted(Path(__file__).parents[1].rglob("test_*_kernels.py"),
                      key=lambda path: (-path.stat().st_size, path))
SUPPORT = str(Path(__file__).parents[1] / "support")


def interpret(path):
    """pytest on one file."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": SUPPORT}
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", str(path)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=path.parent, timeout=600)


def check(path, done):
    """Raise unless tests ran, all of them, and passed."""
    summary = done.stdout.strip().rsplit("\n", 1)[-1]
    ran_all = re.search(r"[1-9]\d* passed", summary) and not re.search("skipped|xfailed|error", summary)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert ran_all, f"{path.name} in the interpreter: {summary}"


@pytest.fixture(scope="module")
def interpreted(request):
    """What `interpret` returns for a file, which may have begun before it is asked for."""
    if hasattr(request.config, "workerinput"):  # of pytest-xdist
        yield interpret
        return
    chosen = [item.callspec.params["path"] for item in request.session.items
              if getattr(item, "originalname", "") == "test_kernels_in_the_interpreter"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        begun = {path: pool.submit(interpret, path) for path in chosen}
        yield lambda path: begun[path].result()


@pytest.mark.long
@pytest.mark.parametrize("path", KERNEL_TESTS, ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(path, interpreted):
    check(path, interpreted(path))


def test_there_are_kernel_tests():
    assert KERNEL_TESTS


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("def test_a(): pass\ndef test_b(): assert False, 'broken kernel'", "broken kernel"),
        ("x = 1", "no tests ran"),
        ("import pytest\ndef test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass", "skipped"),
        ("import no_such_module\ndef test_a(): pass", "no_such_module"),
    ],
    ids=["fails", "empty", "skips", "does not import"],
)
def test_a_bad_kernel_test_file_is_noticed(tmp_path, body, complaint):
    path = tmp_path / "test_bad_kernels.py"
    path.write_text(body)
    done = interpret(path)
    with pytest.raises(AssertionError, match=complaint):
        check(path, done)


def test_the_interpreter_is_on_inside(tmp_path):
    path = tmp_path / "test_env_kernels.py"
    path.write_text("from kernel_checks import kernel_device\ndef test_a(): assert kernel_device() == 'cpu'")
    check(path, interpret(path))
