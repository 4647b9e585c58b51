"""The `phi1` command: its output, its exit codes, and one line for every mistake."""

import importlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from phi1.cli.main import COMMANDS, main
from phi1.config import Phi1Config
from phi1.generation import generate
from phi1.model import Phi1
from phi1.tokenizer import load_tokenizer, train_bpe
from phi1.weights.huggingface import load, save

CONFIG = Phi1Config(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                    rotary_dim=8, max_position_embeddings=4096)
RUN = [sys.executable, "-c", "import sys; from phi1.cli.main import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that never draws the end of text, with its tokenizer."""
    torch.manual_seed(0)
    model, tokenizer = Phi1(CONFIG), train_bpe(["def f(x):\n    return x\n"], 300)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
        model.head.bias[tokenizer.eos_id] = -1e4
    target = tmp_path_factory.mktemp("cli") / "model"
    save(model, target, tokenizer=tokenizer)
    return target


def run(*argv):
    """Run main in this process; an exit of argparse gives its code."""
    try:
        return main([str(item) for item in argv])
    except SystemExit as stop:
        return stop.code


def error_line(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def test_generate_writes_the_text_and_prints_the_seed_of_a_sample(folder, capsys):
    assert run("generate", "--model", folder, "--prompt", "def f", "--max-new-tokens", 20, "--device", "cpu") == 0
    out, err = capsys.readouterr()
    (expected,) = generate(load(folder, device="cpu"), load_tokenizer(folder), "def f", max_new_tokens=20)
    assert out == expected
    assert err.startswith("phi1 generate: 20 tokens in ")
    assert "seed" not in err

    options = ["generate", "--model", folder, "--prompt", "def f", "--max-new-tokens", 30, "--device", "cpu",
               "--temperature", 1.5, "--top-k", 50, "--top-p", 0.9]
    assert run(*options) == 0
    out, err = capsys.readouterr()
    seed = int(err.split("seed ")[1].split()[0])
    assert run(*options, "--seed", seed) == 0
    assert capsys.readouterr().out == out
    (expected,) = generate(load(folder, device="cpu"), load_tokenizer(folder), "def f", max_new_tokens=30,
                           temperature=1.5, top_k=50, top_p=0.9, seed=seed)
    assert out == expected


@pytest.mark.parametrize("way", ["file", "stdin"])
def test_prompts_from_a_file_and_from_standard_input(folder, tmp_path, capsys, monkeypatch, way):
    raw = "def é():\r\n".encode()
    (tmp_path / "prompt.py").write_bytes(raw)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="ascii"))
    source = ["-"] if way == "stdin" else ["--prompt-file", tmp_path / "prompt.py"]
    assert run("generate", "--model", folder, *source, "--max-new-tokens", 9, "--echo", "--dtype", "float32") == 0
    (expected,) = generate(load(folder), load_tokenizer(folder), raw.decode(), max_new_tokens=9)
    assert capsys.readouterr().out == raw.decode() + expected


def test_stop_strings(folder, capsys):
    base = ["generate", "--model", folder, "--prompt", "x", "--max-new-tokens", 40]
    assert run(*base) == 0
    text = capsys.readouterr().out
    assert run(*base, "--stop", "not there", "--stop", text[7:9]) == 0
    out, err = capsys.readouterr()
    assert out == text[: text.index(text[7:9])]
    assert "ended by stop" in err


def test_escapes_in_stop_strings(folder, capsys, monkeypatch):
    import phi1.generation

    seen = []

    def stream(*args, stop, **options):
        seen.extend(stop)
        return phi1.generation.Completion("")
        yield

    monkeypatch.setattr(phi1.generation, "stream", stream)
    assert run("generate", "--model", folder, "--prompt", "x", "--stop", r"\n\tdef", "--stop", "a\nb") == 0
    assert seen == ["\n\tdef", "a\nb"]


MISTAKES = {
    "no command": ([], r"phi1: error: give a command: generate, humaneval, prepare, convert, "),
    "misspelt command": (["genrate"], r"phi1: error: there is no command 'genrate'; did you mean generate?"),
    "strange command": (["fly"], r"phi1: error: there is no command 'fly'; there are generate, humaneval"),
    "misspelt option": (["generate", "--model", "m", "--prompt", "x", "--temprature=1"],
                        "unrecognized arguments: --temprature=1; did you mean --temperature?"),
    "abbreviated option": (["generate", "--model", "m", "--prompt", "x", "--temp", "1"],
                           "unrecognized arguments: --temp;"),
    "no prompt": (["generate", "--model", "m"], "give the prompt in one way: --prompt TEXT"),
    "two prompts": (["generate", "--model", "m", "--prompt", "x", "-"], "give the prompt in one way: --prompt TEXT"),
    "a bare prompt": (["generate", "--model", "m", "hello"], "unexpected 'hello'; a prompt is given with --prompt"),
    "no model": (["generate", "--prompt", "x"], "the following arguments are required: --model"),
    "not a number": (["generate", "--model", "m", "--prompt", "x", "--top-k", "many"], "--top-k: invalid int value"),
    "temperature": (["generate", "--model", "MODEL", "--prompt", "x", "--temperature", "-1"],
                    "phi1 generate: error: generate: temperature must be 0 (greedy) or more; got -1.0"),
    "no such folder": (["generate", "--model", "/no/such", "--prompt", "x"],
                       "phi1 generate: error: --model: there is no folder /no/such"),
    "no such model": (["generate", "--model", "no such", "--prompt", "x"],
                      "phi1 generate: error: --model: there is no folder no such"),
    "no such device": (["generate", "--model", "MODEL", "--prompt", "x", "--device", "cuda:99"],
                       "cuda:99 is not there"),
    "no such file": (["generate", "--model", "MODEL", "--prompt-file", "/no/prompt"],
                     "phi1 generate: error: /no/prompt: No such file or directory"),
    "not UTF-8": (["generate", "--model", "MODEL", "--prompt-file", "BINARY"],
                  "not UTF-8 text: invalid start byte at byte 2"),
    "prompt too long": (["generate", "--model", "MODEL", "--prompt", "é" * 2048], "has 4096 tokens"),
    "truncated": (["generate", "--model", "TRUNCATED", "--prompt", "x"], "model.safetensors is damaged, truncated"),
    "another tokenizer": (["generate", "--model", "MODEL", "--prompt", "hello", "--tokenizer", "microsoft/phi-1"],
                          "prompt has token id 31373, and the model's vocabulary ends at 319"),
    "no such tokenizer": (["generate", "--model", "MODEL", "--prompt", "x", "--tokenizer", "no/such/one"],
                          "phi1 generate: error: --tokenizer: must be a folder or a Hub id (owner/name); got 'no/such"),
    "convert to a full folder": (["convert", "--model", "MODEL", "--out", "MODEL"],
                                 "--out must be a new or empty folder"),
    "convert nothing": (["convert", "--model", "/no/such", "--out", "OUT"], "--model: there is no folder /no/such"),
    "convert a run": (["convert", "--model", "RUN", "--out", "OUT"],
                      "run is a run: give one of its checkpoints, such as "),
    "convert dtype": (["convert", "--model", "MODEL", "--out", "OUT", "--dtype", "int8"],
                      "--dtype: invalid choice: 'int8'"),
    "doctor option": (["doctor", "--fast"], "unrecognized arguments: --fast"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_line_and_exit_code_2(folder, tmp_path, capsys, mistake):
    argv, message = MISTAKES[mistake]
    (tmp_path / "binary").write_bytes(b"ab\xff")
    (tmp_path / "run" / "checkpoints" / "step-20").mkdir(parents=True)
    shutil.copytree(folder, tmp_path / "truncated")
    os.truncate(tmp_path / "truncated" / "model.safetensors", 5000)
    names = {name.upper(): tmp_path / name for name in ("binary", "truncated", "run", "out")} | {"MODEL": folder}
    assert run(*(names.get(item, item) for item in argv)) == 2
    line = error_line(capsys)
    assert message in line
    assert line.startswith("phi1")
    assert not (tmp_path / "out").exists()


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    def wrong(argv):
        raise {}["a bug"]

    def bug(argv):
        raise RuntimeError("shapes differ")

    monkeypatch.setitem(COMMANDS, "doctor", (wrong, ""))
    with pytest.raises(KeyError):
        main(["doctor"])
    monkeypatch.setitem(COMMANDS, "doctor", (bug, ""))
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["doctor"])


def test_running_out_of_memory_is_one_line(monkeypatch, capsys):
    def hungry(argv):
        torch.empty(1 << 60)

    monkeypatch.setitem(COMMANDS, "doctor", (hungry, ""))
    assert run("doctor") == 2
    assert "memory" in error_line(capsys)


def test_convert_writes_the_current_layout(folder, tmp_path, capsys):
    assert run("convert", "--model", folder, "--out", tmp_path / "half", "--dtype", "float16") == 0
    assert "float16, written to" in capsys.readouterr().err
    before, after = load(folder, device="cpu"), load(tmp_path / "half", device="cpu")
    assert torch.equal(after.head.weight, before.head.weight.half())
    assert load_tokenizer(tmp_path / "half").fingerprint == load_tokenizer(folder).fingerprint
    assert json.loads((tmp_path / "half" / "config.json").read_text())["eos_token_id"] == load_tokenizer(folder).eos_id

    bare = tmp_path / "bare"
    save(before, bare)
    assert run("convert", "--model", bare, "--out", tmp_path / "out") == 0
    assert "has no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert run("convert", "--model", bare, "--out", tmp_path / "with", "--tokenizer", folder) == 0
    assert (tmp_path / "with" / "tokenizer.json").exists()


def test_prepare_gets_its_own_arguments(monkeypatch):
    import types

    seen = []
    room = types.ModuleType("phi1.train.commands.prepare")
    room.main = lambda argv: seen.append(argv)
    monkeypatch.setitem(sys.modules, "phi1.train.commands.prepare", room)
    assert run("prepare", "--out", "x", "--help") == 0
    assert seen == [["--out", "x", "--help"]]


@pytest.fixture
def whole():
    """All that phi1 needs is installed."""
    for name in ("datasets", "pydantic", "rich", "tomli_w"):
        importlib.import_module(name)


@pytest.mark.usefixtures("whole")
def test_doctor_checks_this_machine(capsys):
    assert run("doctor") == 0
    out = capsys.readouterr().out
    for subject in ("python", "torch", "triton", "safetensors", "processor", "layer_norm", "model", "memory", "disk,"):
        assert subject in out
    assert f"{torch.__version__} (needs" in out
    assert "FAIL" not in out


@pytest.mark.usefixtures("whole")
def test_doctor_finds_what_is_broken(monkeypatch, capsys):
    import importlib.metadata

    import phi1.cli.doctor
    import phi1.kernels

    real = importlib.metadata.version
    monkeypatch.setattr(phi1.kernels, "layer_norm", lambda x, weight, bias: x)
    monkeypatch.setattr(phi1.cli.doctor.importlib.metadata, "version",
                        lambda name: "0.0.1" if name == "safetensors" else real(name))
    monkeypatch.setattr(phi1.cli.doctor.shutil, "disk_usage",
                        lambda path: (_ for _ in ()).throw(OSError("disk on fire")))
    assert run("doctor") == 1
    failures = [line.split()[1].rstrip(",") for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failures == ["safetensors", "layer_norm", "disk"]


def test_help_is_light(tmp_path):
    code = "import sys; from phi1.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n" \
           "print([m for m in ('torch', 'triton', 'numpy', 'rich', 'tokenizers', 'pydantic') if m in sys.modules])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout
    assert result.stdout.endswith("[]\n")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def started(folder, tmp_path, **options):
    """Start a real process that writes without end."""
    return subprocess.Popen([*RUN, "generate", "--model", str(folder), "--prompt", "x", "--max-new-tokens", "4000"],
                            cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, **options)


def test_ctrl_c_keeps_what_is_there(folder, tmp_path):
    with started(folder, tmp_path, stdout=subprocess.PIPE) as process:
        first = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err == b""
    (first + rest).decode()  # ends with a whole character
    assert len(first) == 20


def test_a_reader_that_leaves_is_no_error(folder, tmp_path):
    with started(folder, tmp_path, stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=300) == 141
        assert process.stderr.read() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(folder, tmp_path):
    with open("/dev/full", "wb") as full, started(folder, tmp_path, stdout=full) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err == b"phi1 generate: error: No space left on device\n"
