"""The commands of bench/gpu.sh's stages, and the packages that they need beside PyTorch, Triton and NumPy."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1]
ROOT = BENCH.parent
STAGE_SECONDS = 540
# A line a test, so that what ran is known where the time was not enough.
PYTEST = ("-m", "pytest", "-v", "-rf", "--tb=short", "-p", "no:cacheprovider", "-p", "phi1.bench.gpu.print_failures",
          "-p", "phi1.bench.gpu.leave_out", "-o", "addopts=--import-mode=importlib")
OF_STAGES = ("test_gpu_rehearsal.py", "test_gpu_bare.py", "test_gpu_stopped.py")
LEFT_OUT = "left out, "  # how a line of leave_out.py begins
LAYER = "parallel_block N=16384 T=2048 D=2048 F=8192 H=32 float16 forward+backward"
SMALL_LAYER = "parallel_block N=256 T=128 D=256 F=1024 H=4 float32 forward+backward cpu"
LAYER_PEERS = ("torch", "torch+sdpa-cudnn", "liger+cudnn", "transformers-max")
TUNED_AGAIN = ("transformers-max+sdpa-cudnn",)

NEEDS = {
    "check": ("numpy", "pytest", "pytest_benchmark", "phi1.bench.harness.check"),
    "kernels": ("numpy", "phi1.bench.harness.runner"),
    "block": ("numpy", "transformers", "phi1.bench.harness.runner", "phi1.train.step.trainer"),
    "train": ("numpy", "tokenizers", "phi1.train.step.trainer"),
    "decode": ("numpy", "transformers", "phi1.bench.harness.runner", "phi1.generation"),
    "tune": ("numpy", "phi1.bench.harness.runner"),
    "profile": ("numpy", "phi1.model"),
}
"""Stage -> modules that must import, of other packages first. Tests that need more are left out, and said so."""


@dataclass(frozen=True)
class Command:
    """One command of a stage.

    Args:
        name: of its log and its row.
        words: the command; Python's where it starts with a script or an option.
        seconds: its limit.
        program: skipped, and said so, where this program is not on the PATH.
        environment: added to the stage's.
        minutes: its last word is these or, where it has less left, that. With it exit code 3 says that the GPU was lost
            and that the same command goes on.
    """

    name: str
    words: tuple[str, ...]
    seconds: int = STAGE_SECONDS
    program: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    minutes: float = 0.0


def commands(stage: str, out: Path, rehearse: bool) -> list[Command]:
    """The commands of a stage; a rehearsal runs the same scripts on a CPU, with little work."""
    script = {name: str(BENCH / "gpu" / f"{file}.py")
              for name, file in (("train", "train"), ("profile", "profile_step"), ("sanitize", "sanitize"))}
    tiny = ("--rehearse",) if rehearse else ()
    if stage == "check":
        return _rehearsed_check(script["sanitize"]) if rehearse else _check(script["sanitize"])
    if stage in ("kernels", "block", "decode"):
        return _bench(stage, out, rehearse)
    if stage == "train":
        return [Command(part, (script["train"], part, "--out", str(out), *tiny, "--minutes"), seconds, minutes=minutes)
                for part, seconds, minutes in (("search", 230, 2.5), ("run", 330, 4.5))]
    if stage == "tune":
        tune = (str(BENCH / "tune" / "tune.py"), "--out", str(out / "tuned"))
        search = Command("search", (*tune, "--compilers", "6", "--minutes"), minutes=8.0)
        dry = Command("list", (*tune, "--dry-run"), 60)
        return [dry, *([] if rehearse else [search])]
    return [Command("trace", (script["profile"], "trace", "--out", str(out), *tiny), 200),
            Command("counters", (script["profile"], "counters", "--out", str(out), *tiny), 300)]


def _check(sanitize: str) -> list[Command]:
    tests = str(ROOT / "tests")
    # The interpreter's tests say nothing here, nor do those of packaging; the rest is what users run.
    left_out = [word for name in ("test_interpreter.py", "test_packaging.py", *OF_STAGES)
                for word in ("--ignore-glob", f"*/{name}")]
    return [
        Command("kernels", (*PYTEST, *_side_by_side(6), "-m", "triton", tests), 240),
        Command("sanitizer", ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable,
                              sanitize), 120, program="compute-sanitizer",
                # PyTorch's allocator cuts tensors out of large blocks, within which memcheck sees no bounds.
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        Command("suite", (*PYTEST, *_side_by_side(6), "-m", "not triton", *left_out, tests), 250),
    ]


def _side_by_side(workers: int) -> tuple[str, ...]:
    return ("-n", str(workers)) if importlib.util.find_spec("xdist") else ()


def _rehearsed_check(sanitize: str) -> list[Command]:
    tests = ROOT / "tests"
    norms = str(tests / "kernels" / "pointwise" / "test_layer_norm.py")
    return [
        Command("kernels", (*PYTEST, norms, "-k", "widest or empty"), 100,
                environment={"TRITON_INTERPRET": "1"}),
        Command("sanitizer", (sanitize, "--rehearse"), 60),
        Command("suite", (*PYTEST, str(tests / "phi1" / "test_config.py"),
                          str(tests / "kernels" / "core" / "test_philox.py")), 100),
    ]


def _bench(stage: str, out: Path, rehearse: bool) -> list[Command]:
    """The benchmarks of a stage: the short selection first, then all of it as far as the time goes."""
    start = ("-c", "import sys; from phi1.cli.main import main; sys.exit(main())", "bench")
    chosen = {"kernels": ("--unit", "kernel"), "block": ("--unit", "block"),
              "decode": ("--op", "decode", "prefill")}[stage]
    model = ("--op", "micro-step", "--quick")

    def json(name: str) -> tuple[str, str]:
        return "--json", str(out / f"{name}.json")

    # The figure for a whole layer: its peer that is tuned for minutes has a command of its own, and so has the same one
    # with cuDNN's attention. That is quicker behind it: torch.compile keeps the times of products that it has tuned.
    def layer(name: str, peers: tuple[str, ...]) -> tuple[str, ...]:
        return "--case", SMALL_LAYER if rehearse else LAYER, "--peers", *peers, *json(name)

    both = {"max": layer("max", LAYER_PEERS), "max-cudnn": layer("max-cudnn", TUNED_AGAIN)}
    if rehearse:
        little = ("--device", "cpu", "--seconds", "0.01")
        alone = (*little, "--peers")
        quick = Command("quick", (*start, *chosen, "--quick", *json("quick"), *alone), 150)
        rest = (*start, *chosen, "--case", "gelu", "--last", str(out / "quick.json"), *json("all"), *alone)
        beside = [*(Command(name, (*start, *words, *little), 150) for name, words in both.items()),
                  Command("model", (*start, *model, *alone), 60)]
        return [quick, *{"block": beside, "kernels": [Command("all", rest, 60)]}.get(stage, [])]
    # `--minutes` starts no case too late to end before the limit, which would lose it. The whole model beside its peers
    # belongs to the block: it is what the block is for.
    seconds, minutes, rest_minutes = (165, 2.0, 1.0) if stage == "block" else (260, 3.5, 3.5)

    def timed(name: str, *words: str, seconds: int, minutes: float) -> Command:
        return Command(name, (*start, "--device", "cuda", *words, "--minutes"), seconds, minutes=minutes)

    quick = timed("quick", *chosen, "--quick", *json("quick"), seconds=seconds, minutes=minutes)
    beside = [timed("max", *both["max"], seconds=185, minutes=2.5),
              timed("max-cudnn", *both["max-cudnn"], seconds=100, minutes=1.0),
              timed("model", *model, *json("model"), seconds=165, minutes=2.0)] if stage == "block" else []
    return [quick, *beside, timed("all", *chosen, "--seconds", "1", "--last", str(out / "quick.json"), *json("all"),
                                  seconds=STAGE_SECONDS, minutes=rest_minutes)]
