"""The direction of imports between the rooms, read from the sources, and what an import costs.

Every import counts: at the top of a file, inside a function and under TYPE_CHECKING.
"""

import ast
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from phi1 import kernels
from phi1.kernels.core.backend import built_for_gpus

ROOT = Path(__file__).parents[2]
FOLDERS = {"kernels": "phi1.kernels", "phi1": "phi1", "train": "phi1.train", "bench": "phi1.bench"}
PUBLIC = set(kernels.__all__)

KERNEL_ROOMS = ("core", "pointwise", "gemm", "cross_entropy", "attention", "block")
TRAIN = (("runtime",), ("recipe", "data"), ("step", "prepare", "plan"), ("checkpoint", "metrics", "evaluate"),
         ("commands",), ("run",))
BENCH = (("harness",), ("peers",), ("cases",), ("report",), ("compile", "gpu"), ("tune",))


def below(tiers, package):
    """Return, for each room, the rooms of the tiers below its own."""
    return {f"{package}.{room}": {f"{package}.{lower}" for tier in tiers[:i] for lower in tier}
            for i, tier in enumerate(tiers) for room in tier}


MAY_IMPORT = {  # room -> the other rooms of its own folder that it may import
    "phi1.kernels.core": set(),
    "phi1.kernels.pointwise": {"phi1.kernels.core"},
    "phi1.kernels.gemm": {"phi1.kernels.core", "phi1.kernels.pointwise"},
    "phi1.kernels.cross_entropy": {"phi1.kernels.core"},
    "phi1.kernels.attention": {"phi1.kernels.core", "phi1.kernels.pointwise"},
    "phi1.kernels.block": {f"phi1.kernels.{room}" for room in KERNEL_ROOMS},
    "phi1.kernels": {f"phi1.kernels.{room}" for room in KERNEL_ROOMS},
    "phi1": set(),
    "phi1.weights": {"phi1"},
    "phi1.integrations": set(),
    "phi1.evaluate": {"phi1", "phi1.weights"},
    "phi1.cli": {"phi1", "phi1.weights", "phi1.evaluate"},
    **below(TRAIN, "phi1.train"),
    "phi1.train": {f"phi1.train.{room}" for tier in TRAIN for room in tier},
    **below(BENCH, "phi1.bench"),
    "phi1.bench": {f"phi1.bench.{room}" for tier in BENCH for room in tier},
}
FOLDERS_BELOW = {"kernels": set(), "phi1": {"kernels"}, "train": {"kernels", "phi1"},
                 "bench": {"kernels", "phi1", "train"}}
OF_KERNELS = {  # the modules of kernels/ that another folder may import
    "phi1": {"phi1.kernels", "phi1.kernels.core.checks", "phi1.kernels.core.cpu_memory"},
    "train": {"phi1.kernels"},
    "bench": {"phi1.kernels", "phi1.kernels.core.cpu_matmul", "phi1.kernels.core.tiles"},
}
LEAF = "phi1.arguments"  # every folder may import it, and it imports the standard library alone


@cache
def modules():
    """Return the file of every module of the package, by the module's name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def folder_of(module):
    """Return the top-level folder of a module of ours, or None for another module."""
    parts = module.split(".")
    if parts[0] != "phi1":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ("kernels", "train", "bench") else "phi1"


def room_of(module):
    """Return the longest package of MAY_IMPORT that holds the module."""
    return max((room for room in MAY_IMPORT if module == room or module.startswith(f"{room}.")), key=len)


def imports(source):
    """Yield (module, name or None) for each imported name. A module of ours that is imported by name is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                # The public functions of kernels have the names of rooms.
                public = node.module == "phi1.kernels" and alias.name in PUBLIC
                yield (whole, None) if whole in modules() and not public else (node.module, alias.name)


def complaint(importer, module, name):
    """Return the rule that an import breaks, or None."""
    ours, theirs = folder_of(importer), folder_of(module)
    if importer == LEAF:
        return None if module.split(".")[0] in sys.stdlib_module_names else f"{LEAF} does not need {module}"
    if theirs is None:
        top = module.split(".")[0]
        if ours != "kernels":
            return None
        if top == "triton" and not importer.endswith("_triton"):
            return "Triton is imported in *_triton.py alone"
        known = {"torch", "triton", "numpy"} | sys.stdlib_module_names
        return None if top in known else f"kernels/ does not need {top}"
    if room_of(importer) == "phi1.cli" or importer == "phi1" or module == LEAF:
        return None
    if ours == theirs:
        if room_of(module) == room_of(importer) or room_of(module) in MAY_IMPORT[room_of(importer)]:
            return None
        return f"{room_of(importer)} may not import {room_of(module)}"
    if theirs not in FOLDERS_BELOW[ours]:
        return f"{ours}/ imports nothing of {theirs}/"
    if room_of(module) == "phi1.cli":
        return "nothing imports the command line"
    if theirs == "kernels" and module not in OF_KERNELS[ours]:
        return "only public names of phi1.kernels"
    if module == "phi1.kernels" and name is not None and name not in PUBLIC:
        return f"phi1.kernels has no public name {name}"
    return None


def violations(importer, source):
    return [f"{importer} imports {module}{f' ({name})' if name else ''}: {rule}"
            for module, name in imports(source) if (rule := complaint(importer, module, name))]


@pytest.mark.parametrize("folder", FOLDERS)
def test_rooms_keep_their_direction(folder):
    assert [v for module, path in modules().items() if folder_of(module) == folder
            for v in violations(module, path.read_text())] == []


def circle(graph):
    """Return the modules of one circle of imports, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: {other for other, _ in imports(path.read_text()) if other in modules()}
             for module, path in modules().items() if module != "phi1"}
    assert circle(graph) == []


@pytest.mark.parametrize("folder", [*FOLDERS, "examples", "tests"])
def test_folders_and_files_stay_small(folder):
    sizes = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
             for path in (ROOT / folder).rglob("*.py")}
    counts = Counter(path.parent for path in sizes)
    assert {folder: count for folder, count in counts.items() if count > 16} == {}, "at most 16 files a folder"
    assert {path: lines for path, lines in sizes.items() if lines > 300} == {}, "at most 300 lines a file"


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("phi1.kernels.pointwise.gelu", "import triton"),
        ("phi1.kernels.pointwise.gelu", "def f():\n    import triton.language as tl"),
        ("phi1.kernels.pointwise.gelu", "from phi1.kernels.gemm.linear import linear"),
        ("phi1.kernels.core.checks", "if TYPE_CHECKING:\n    from phi1.kernels.pointwise.gelu import gelu"),
        ("phi1.kernels.pointwise.gelu", "from phi1.config import Phi1Config"),
        ("phi1.kernels.pointwise.gelu", "from phi1 import train"),
        ("phi1.kernels.pointwise.gelu", "import rich"),
        ("phi1.model", "from phi1.kernels.core.backend import use_triton"),
        ("phi1.model", "from phi1.kernels import gelu_reference"),
        ("phi1.arguments", "import torch"),
        ("phi1.arguments", "from phi1.config import Phi1Config"),
        ("phi1.train.step.trainer", "from phi1.kernels.core.checks import check_rank"),
        ("phi1.model", "from phi1.kernels.core import backend"),
        ("phi1.model", "def f():\n    from phi1.train.data import corpus"),
        ("phi1.model", "import phi1.bench.compile.read"),
        ("phi1.model", "from phi1.weights.huggingface import load"),
        ("phi1.train.step.trainer", "from phi1.cli.main import main"),
        ("phi1.train.step.trainer", "def f():\n    from phi1.bench.cases import registry"),
        ("phi1.train.step.trainer", "from phi1.train.run import loop"),
        ("phi1.train.recipe.recipe", "from phi1.train.data.corpus import Corpus"),
        ("phi1.train.step.trainer", "from phi1.kernels.core.philox import threshold"),
        ("phi1.bench.harness.check", "from phi1.bench.cases.registry import select"),
        ("phi1.bench.harness.check", "from phi1.kernels.core.philox import threshold"),
    ],
)
def test_a_wrong_import_is_found(importer, source):
    assert len(violations(importer, source)) >= 1


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("phi1.kernels.pointwise.gelu_triton", "import triton\nfrom phi1.kernels.core.tiles import tile"),
        ("phi1.kernels.pointwise.gelu", "def f():\n    from phi1.kernels.pointwise.gelu_triton import launch"),
        ("phi1.kernels.block.rules", "from phi1.kernels.pointwise.layer_norm import layer_norm_reference"),
        ("phi1.kernels.pointwise.gelu", "from phi1.arguments import require"),
        ("phi1.cli.main", "def f():\n    from phi1.train.prepare import prepare"),
        ("phi1.model", "from phi1.kernels import Dropout, attention\nfrom phi1.config import Phi1Config"),
        ("phi1.train.step.trainer", "from phi1.kernels import backend\nfrom phi1.train.data.corpus import Corpus"),
        ("phi1.train.run.loop", "from phi1.train.commands.verify import verify\nimport phi1"),
        ("phi1.bench.cases.norm", "from phi1.train.data import corpus\nfrom phi1.kernels.core.tiles import tile"),
    ],
)
def test_a_right_import_is_let_through(importer, source):
    assert violations(importer, source) == []


def test_a_circle_is_found():
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}


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
    files = {f"phi1.kernels.{file.parent.name}.{file.stem}" for file in (ROOT / "kernels").rglob("*_triton.py")}
    assert "phi1.kernels.attention.launch_triton" in files <= set(done.stdout.split())


def test_nothing_is_installed_as_a_top_level_kernels():
    # transformers takes any package of that name for Hugging Face's.
    code = "import importlib.util; print(importlib.util.find_spec('kernels'))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert "phi1" not in done.stdout
    assert str(ROOT) not in done.stdout
