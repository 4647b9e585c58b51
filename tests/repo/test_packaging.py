"""The wheel holds every room and nothing else, and the checkout hides no other distribution."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePath

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory) -> set[str]:
    out = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    source = tmp_path_factory.mktemp("source")  # a copy: building leaves build/ and egg-info/ beside setup.py
    for name in filter(None, tracked.decode().split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_tracked_module_of_every_room(wheel_names):
    tracked = subprocess.run(["git", "ls-files", "phi1", "kernels", "train", "bench"], cwd=ROOT, capture_output=True,
                             text=True, check=True).stdout.split()
    expected = {name if name.startswith("phi1/") else f"phi1/{name}" for name in tracked if name.endswith(".py")}
    assert expected == {name for name in wheel_names if name.endswith(".py")}
    rooms = {path.parent for path in map(PurePath, expected)} - {PurePath("phi1/assets")}
    assert len(rooms) > 30
    assert {room for room in rooms if str(room / "__init__.py") not in wheel_names} == set()


def test_wheel_holds_the_data_of_each_room(wheel_names):
    suffixes = {"phi1/py.typed", "phi1/assets/gpt2-merges.gz", "phi1/train/configs/nano.toml"}
    assert suffixes <= wheel_names
    tables = subprocess.run(["git", "ls-files", "kernels/tuned", "train/configs"], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout.split()
    assert {f"phi1/{name}" for name in tables if name.endswith((".json", ".toml"))} <= wheel_names


def test_wheel_has_no_other_top_level(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"phi1"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)


def test_checkout_is_not_on_the_path():
    assert ROOT not in {Path(entry or ".").resolve() for entry in sys.path}


def test_import_is_light():
    code = "import sys, phi1; print(sorted({'torch', 'triton', 'numpy', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "[]"
