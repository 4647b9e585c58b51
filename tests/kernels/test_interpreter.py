"""Runs the tests of the Triton kernels in Triton's interpreter, a group of files in a process.

TRITON_INTERPRET acts on import, hence the processes. There the plugin kernel_backends leaves out every test that needs
no kernel. Each process uses one core. Under `pytest -n` the workers take the groups one by one, as other tests;
otherwise as many run at once as there are cores. A group's id holds its files' names, so that `-k gelu` finds it.
"""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ON_KERNELS = re.compile(r"mark\.triton|def test_\w+\([^)]*\bdevice\b")
KERNEL_TESTS = sorted((path for path in TESTS.rglob("test_*.py") if ON_KERNELS.search(path.read_text())
                       and path != Path(__file__)), key=lambda path: (-path.stat().st_size, path))


def in_groups(paths, number=10):
    """Divide files into groups of about one size: imports take 4 s a process, and groups fill the cores to the end."""
    groups = [[] for _ in range(number)]
    for path in paths:
        min(groups, key=lambda group: sum(other.stat().st_size for other in group)).append(path)
    return groups


def interpret(*paths):
    """Run pytest on some files."""
    search = os.pathsep.join(filter(None, (str(TESTS / "support"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "--import-mode=importlib", "-p",
               "no:cacheprovider", "-p", "kernel_backends", *map(str, paths)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=paths[0].parent, timeout=600)


def check(paths, done):
    """Raise unless tests of each file ran, all of them, and passed."""
    summary = done.stdout.strip().rsplit("\n", 1)[-1]
    ran_all = re.search(r"[1-9]\d* passed", summary) and not re.search("skipped|xfailed|error", summary)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert ran_all, f"{paths[0].name} in the interpreter: {summary}"
    without = [path.name for path in paths if not re.search(rf"^PASSED \S*{path.name}::", done.stdout, re.MULTILINE)]
    assert not without, f"no tests ran of {without}"


@pytest.fixture(scope="module")
def interpreted(request):
    """`interpret`, for files that may have begun before they are asked for."""
    if hasattr(request.config, "workerinput"):  # of pytest-xdist
        yield interpret
        return
    chosen = [item.callspec.params["group"] for item in request.session.items
              if getattr(item, "originalname", "") == "test_kernels_in_the_interpreter"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        begun = {group: pool.submit(interpret, *group) for group in map(tuple, chosen)}
        yield lambda *group: begun[group].result()


@pytest.mark.long
@pytest.mark.parametrize("group", in_groups(KERNEL_TESTS), ids=lambda group: "-".join(path.stem for path in group))
def test_kernels_in_the_interpreter(group, interpreted):
    check(group, interpreted(*group))


def test_there_are_kernel_tests(request):
    """Every test with a backend lies in a file that the interpreter runs."""
    assert len(KERNEL_TESTS) > 15
    found = {item.path for item in request.session.items
             if getattr(item, "callspec", None) and item.callspec.params.get("device") in ("eager", "triton")}
    assert found <= set(KERNEL_TESTS)


ON_TRITON = "import pytest\npytestmark = pytest.mark.triton\n"


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("def test_a(): pass\ndef test_b(): assert False, 'broken kernel'", "broken kernel"),
        ("x = 1", "no tests ran"),
        ("def test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass", "skipped"),
        ("import no_such_module\ndef test_a(): pass", "no_such_module"),
        ("@pytest.mark.eager\ndef test_a(): pass", "1 deselected"),
    ],
    ids=["fails", "empty", "skips", "does not import", "runs on no kernel"],
)
def test_a_bad_kernel_test_file_is_noticed(tmp_path, body, complaint):
    path = tmp_path / "test_bad.py"
    path.write_text(ON_TRITON + body)
    done = interpret(path)
    with pytest.raises(AssertionError, match=complaint):
        check([path], done)


PARTS = """
import pytest
from kernel_checks import kernel_device
from phi1.kernels.core import backend

def test_needs_no_kernel(): assert False
@pytest.mark.eager
def test_eager(device): assert False
@pytest.mark.parametrize("n", [pytest.param(1, marks=pytest.mark.not_interpreted), pytest.param(2)])
def test_everywhere(device, n): assert (device, n, backend._forced) == ("cpu", 2, "triton")
@pytest.mark.triton
def test_kernel(): assert kernel_device() == "cpu"
"""


def test_the_interpreter_is_on_inside_and_runs_the_tests_of_kernels_alone(tmp_path):
    path = tmp_path / "test_parts.py"
    path.write_text(PARTS)
    done = interpret(path)
    check([path], done)
    assert "2 passed, 3 deselected" in done.stdout
