"""Who may import whom: the direction of travel between the rooms, read from the sources, and what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from phi1 import kernels
from phi1.kernels._backend import built_for_gpus

ROOT = Path(__file__).parent.parent
ROOMS = {"kernels": "phi1.kernels", "phi1": "phi1", "train": "phi1.train", "bench": "phi1.bench"}
PUBLIC = set(kernels.__all__)


def imports(tree):
    """(module, imported names, whether at module level) of every import that runs."""
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    deferred = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], node not in deferred
        elif isinstance(node, ast.ImportFrom):
            module, names = "." * node.level + (node.module or ""), [alias.name for alias in node.names]
            if module == "phi1.kernels" and all(name.startswith("_") for name in names):
                yield from ((f"{module}.{name}", [], node not in deferred) for name in names)  # files of the room
            else:
                yield module, names, node not in deferred


def room_of(module):
    """The room and the file in it that a module of ours lies in, or (None, None)."""
    parts = module.split(".")
    if parts[0] != "phi1":
        return None, None
    if len(parts) > 1 and f"phi1.{parts[1]}" in ROOMS.values():
        return parts[1], ".".join(parts[2:])
    return "phi1", ".".join(parts[1:])


def kernels_rules(name, module, at_top):
    room, file = room_of(module)
    if room is None:
        top = module.split(".")[0]
        if top == "triton":
            yield name.endswith("_triton.py"), "Triton is imported in _*_triton.py alone"
        yield top in {"torch", "triton", "numpy"} or top in sys.stdlib_module_names, f"kernels/ does not need {top}"
        return
    yield room == "kernels", "kernels/ imports nothing above it"
    if file.endswith("_triton"):
        yield not at_top or name.endswith("_triton.py"), "kernels are imported where they are launched"
    elif not file.startswith("_"):
        yield name in {"__init__.py", "block.py", "block_decode.py"}, "what two operations share sits in a _*.py"


def public_rules(room, module, names):
    yield room != "kernels" or module == "phi1.kernels", "only phi1.kernels itself, not the files in it"
    for name in names:
        yield module != "phi1.kernels" or name in PUBLIC, f"phi1.kernels has no public name {name}"


def phi1_rules(name, module, names, at_top):
    room, file = room_of(module)
    roof = name == "cli.py" or name.startswith("cli_")
    yield room != "phi1" or not file.startswith("cli") or (roof and file != "cli"), "nothing imports the command line"
    if roof:
        yield room in {None, "phi1"} or not at_top, "the command line imports a room inside the function that runs it"
        return
    yield room in {None, "phi1", "kernels"}, "phi1/ imports nothing above it"
    yield from public_rules(room, module, names)


def train_rules(module, names):
    room, file = room_of(module)
    yield room != "bench", "train/ reads measured results as data"
    yield room != "phi1" or not file.startswith("cli"), "nothing imports the command line"
    yield from public_rules(room, module, names)


def violations(room, name, source):
    found = []
    for module, names, at_top in imports(ast.parse(source)):
        rules = [(not module.startswith("."), "imports are absolute")]
        # `from phi1 import train` imports a room as much as `import phi1.train`.
        modules = [module] + [f"phi1.{n}" for n in names if module == "phi1" and f"phi1.{n}" in ROOMS.values()]
        for one in modules:
            taken = names if one == module else []
            if room == "kernels":
                rules += kernels_rules(name, one, at_top)
            elif room == "phi1":
                rules += phi1_rules(name, one, taken, at_top)
            elif room == "train":
                rules += train_rules(one, taken)
        found += [f"{room}/{name} imports {module}: {rule}" for holds, rule in rules if not holds]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_keep_their_direction(room):
    files = sorted((ROOT / room).glob("*.py"))
    assert len(files) > 1
    assert [v for path in files for v in violations(room, path.name, path.read_text())] == []


@pytest.mark.parametrize(
    ("room", "name", "source"),
    [
        ("kernels", "gelu.py", "import triton"),
        ("kernels", "_gelu.py", "def f():\n    import triton.language as tl"),
        ("kernels", "gelu.py", "from phi1.kernels.linear import linear"),
        ("kernels", "_gelu.py", "from phi1.kernels.linear import linear"),
        ("kernels", "_gelu.py", "from phi1.kernels._gelu_triton import launch"),
        ("kernels", "gelu.py", "from phi1.config import Phi1Config"),
        ("kernels", "gelu.py", "from phi1 import train"),
        ("kernels", "gelu.py", "import rich"),
        ("kernels", "gelu.py", "from ._checks import require"),
        ("phi1", "model.py", "from phi1.kernels._backend import use_triton"),
        ("phi1", "model.py", "from phi1.kernels.gelu import gelu_reference"),
        ("phi1", "model.py", "from phi1.kernels import _backend"),
        ("phi1", "model.py", "def f():\n    from phi1.train import data"),
        ("phi1", "model.py", "import phi1.bench.static_gate"),
        ("phi1", "model.py", "from phi1.cli import main"),
        ("phi1", "model.py", "from phi1.cli_model import locate_model"),
        ("phi1", "cli_convert.py", "from phi1.cli import Parser"),
        ("phi1", "cli_convert.py", "from phi1.train import convert"),
        ("phi1", "cli.py", "from phi1.train import prepare"),
        ("phi1", "cli.py", "from phi1 import kernels"),
        ("train", "step.py", "def f():\n    from phi1.bench import cases"),
        ("train", "step.py", "from phi1.kernels._philox import threshold"),
        ("train", "step.py", "import phi1.cli"),
    ],
)
def test_a_wrong_import_is_found(room, name, source):
    assert len(violations(room, name, source)) >= 1


@pytest.mark.parametrize(
    ("room", "name", "source"),
    [
        ("kernels", "_gelu_triton.py", "import triton\nfrom phi1.kernels._tuned import tile"),
        ("kernels", "_gelu.py", "def f():\n    from phi1.kernels._gelu_triton import launch"),
        ("kernels", "block.py", "from phi1.kernels.layer_norm import layer_norm_reference"),
        ("phi1", "cli.py", "def f():\n    from phi1.train import prepare"),
        ("phi1", "cli_convert.py", "from phi1.cli_model import locate_model"),
        ("phi1", "cli_convert.py", "def f():\n    from phi1.train import convert"),
        ("phi1", "model.py", "from phi1.kernels import Dropout, layer_norm\nfrom phi1.config import Phi1Config"),
        ("phi1", "testing.py", "from phi1 import kernels"),
        ("phi1", "__init__.py", "if TYPE_CHECKING:\n    from phi1.kernels._philox import Dropout"),
        ("train", "step.py", "from phi1.kernels import backend\nfrom phi1.train.data import open_corpus\nimport phi1"),
        ("bench", "cases.py", "from phi1.train.data import open_corpus\nfrom phi1.kernels._tuned import tile"),
    ],
)
def test_a_right_import_is_let_through(room, name, source):
    assert violations(room, name, source) == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("phi1", ["torch", "triton"]),
     ("phi1, phi1.kernels", ["phi1.train", "phi1.bench", *([] if built_for_gpus() else ["triton"])])],
)
def test_importing_is_cheap(module, unwanted):
    code = f"import {module}, sys; print([m for m in {unwanted} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_where_pytorch_is_built_for_gpus_no_first_call_imports_a_kernel():
    code = "import torch, sys; torch.version.cuda = '13.0'; import phi1.kernels; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    files = {f"phi1.kernels.{file.stem}" for file in (ROOT / "kernels").glob("*_triton.py")}
    assert "phi1.kernels._attention_triton" in files <= set(done.stdout.split())


def test_nothing_is_installed_as_a_top_level_kernels():
    # transformers takes any package of that name for Hugging Face's.
    code = "import importlib.util; print(importlib.util.find_spec('kernels'))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert "phi1" not in done.stdout
    assert str(ROOT) not in done.stdout
