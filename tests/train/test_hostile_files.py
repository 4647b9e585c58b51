"""Files of strangers: each reader of a user's file answers each of them in one line, at once and in little memory."""

import gzip
import json
import os
import resource
import shutil
import signal

import pytest

from phi1 import Phi1Config, load, load_tokenizer, user_files
from phi1.evaluate import humaneval
from phi1.model import Phi1
from phi1.tokenizer import train_bpe
from phi1.train.checkpoint.convert import find_tokenizer
from phi1.train.checkpoint.files import Notes, find_damage, write_manifest
from phi1.train.commands.ledger import _read as read_run
from phi1.train.commands.verify import verify
from phi1.train.data.corpus import open_corpus
from phi1.train.data.shards import MANIFEST, manifest_text
from phi1.train.recipe.file import read_recipe
from phi1.train.runtime.launch import RunError
from phi1.weights.huggingface import save

SECONDS, MEMORY = 20, 2 << 30


@pytest.fixture(autouse=True)
def limits():
    """Raise in a test that takes long, and refuse it memory beyond what the process has and 2 GiB."""
    def late(number, frame):
        raise AssertionError(f"it takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limit)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def told(action):
    """Return the line in which an error of the kinds that commands print says what is wrong."""
    with pytest.raises((ValueError, OSError, RunError)) as raised:
        action()
    error = raised.value
    assert not isinstance(error, UnicodeDecodeError | RecursionError)
    line = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
    assert "\n" not in line
    assert len(line) < 2000
    return line


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(Phi1(Phi1Config(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, rotary_dim=8)), folder)
    train_bpe(["def f(): return 1\n"], 300).save(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step-1"
    folder.mkdir(parents=True)
    (folder / "trainer.json").write_text("{}")
    write_manifest(folder, {"trainer.json": [2, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"]})
    assert find_damage(folder) is None
    return folder


PLACES = {  # a file, and what reads it
    "config.json": lambda path: load(path.parent),
    "generation_config.json": lambda path: load(path.parent),
    "model.safetensors": lambda path: load(path.parent),
    "tokenizer.json": lambda path: load_tokenizer(path.parent),
    "problems.jsonl": lambda path: humaneval.read_problems(path),
    "completions.jsonl": lambda path: humaneval.read_attempts(path, []),
    "recipe.toml": lambda path: read_recipe(path, {}),
    "ledger.jsonl": lambda path: read_run(path),
    MANIFEST: lambda path: open_corpus(path.parent),
}
KINDS = {
    "a pipe": os.mkfifo,
    "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a socket's link to nothing": lambda path: path.symlink_to("nowhere"),
    "no UTF-8": lambda path: path.write_bytes(b'{"a": "\xff"}\n'),
    "deep": lambda path: path.write_bytes(b"[" * 100_000 + b"\n"),
    "a list": lambda path: path.write_bytes(b"[[1]]\n"),
    "a pointer of LFS": lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
    "HTML": lambda path: path.write_bytes(b"<!DOCTYPE html>\n<html></html>\n"),
    "digits": lambda path: path.write_bytes(b'{"task_id": ' + b"9" * 5000 + b"}\n"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PLACES)
def test_what_is_no_such_file_is_one_line(model, name, kind):
    path = model / name
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    if name == "generation_config.json" and kind in ("a pipe", "/dev/zero", "a folder", "a socket's link to nothing"):
        load(model)  # it is no file, and a model needs none
        return
    told(lambda: PLACES[name](path))


@pytest.mark.parametrize("kind", ["a pipe", "/dev/zero", "a folder"])
@pytest.mark.parametrize("name", ["manifest.json", "trainer.json", "a shard"])
def test_a_checkpoint_of_such_files_is_damaged(checkpoint, name, kind):
    path = checkpoint / name
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    if name == "a shard":
        write_manifest(checkpoint, {name: [os.stat(path).st_size, "0" * 64]})
    assert "\n" not in find_damage(checkpoint)


@pytest.mark.parametrize("files", [[1], {"a": 1}, {"a": [1]}, {"a": ["1", 2]}, 3])
def test_a_manifest_of_another_form_is_damage(checkpoint, files):
    write_manifest(checkpoint, files)
    assert find_damage(checkpoint) == "manifest.json is not as it was written"


@pytest.mark.parametrize("notes", ["[]", '{"defining": [1]}', "[" * 100_000, "nothing"])
def test_notes_of_another_form_are_one_line(checkpoint, notes):
    (checkpoint / "trainer.json").write_text(notes)
    assert "trainer.json" in told(lambda: Notes(checkpoint))


def test_a_foreign_config_beside_a_checkpoint_costs_the_tokenizer_alone(checkpoint):
    (checkpoint.parents[1] / "config.toml").write_text("data = [1]")
    assert find_tokenizer(checkpoint) is None


CONTENT = {"vocab_size": 1, "eos_id": 0, "tokenizer": "", "files": {},
           "splits": {split: {"tokens": 0, "bytes": 0, "shards": []} for split in ("train", "val")}}


@pytest.mark.parametrize("content", [
    {}, [], 3, CONTENT | {"splits": {}}, CONTENT | {"files": []}, CONTENT | {"vocab_size": "1"},
    CONTENT | {"files": {"train-00000.bin": 3}}, CONTENT | {"files": {"train-00000.bin": {"bytes": "1"}}},
])
def test_a_corpus_manifest_of_another_form_is_damage(tmp_path, content):
    (tmp_path / MANIFEST).write_text(manifest_text(content, {}))
    assert f"{tmp_path}/{MANIFEST}: damaged: it is no corpus' manifest" in told(lambda: open_corpus(tmp_path))
    [(_, damage)] = verify(tmp_path)
    assert "damaged" in damage


@pytest.mark.parametrize(("key", "value"), [
    ("num_hidden_layers", 10**9), ("num_hidden_layers", 10**12), ("num_hidden_layers", 10**30), ("vocab_size", 10**18),
    ("rope_theta", 10**400), ("partial_rotary_factor", float("inf")), ("max_position_embeddings", 10**30),
    ("rope_parameters", [1]), ("rope_scaling", "linear"), ("layer_norm_eps", float("inf")), ("hidden_size", [64]),
])
def test_numbers_that_no_model_has_are_one_line(model, key, value):
    path = model / "config.json"
    config = json.loads(path.read_text())
    config.pop("rope_parameters")
    path.write_text(json.dumps(config | {key: value}))
    assert str(model) in told(lambda: load(model))


def test_a_header_of_many_tensors_is_a_short_line(model):
    header = {f"tensor.{i}": {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    told(lambda: load(model))


def test_what_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(humaneval, "LARGEST", 1 << 20)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(bytes(1 << 21)))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 1000)[:-20])
    assert "unpacks to more than 1,048,576 bytes" in told(lambda: humaneval.read_problems(tmp_path / "bomb.jsonl.gz"))
    told(lambda: humaneval.read_problems(tmp_path / "cut.jsonl.gz"))


def test_a_recipe_of_dots_or_brackets_is_refused_at_once(tmp_path):
    for text in (".".join("a" * 50_000) + " = 1", "a = " + "[" * 20_000):
        (tmp_path / "recipe.toml").write_text(text)
        told(lambda: read_recipe(tmp_path / "recipe.toml", {}))


def test_a_tokenizer_that_rewrites_texts_or_never_ends_is_one_line(model):
    path = model / "tokenizer.json"
    whole = json.loads(path.read_text())
    bomb = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    path.write_text(json.dumps(whole | {"normalizer": {"type": "Sequence", "normalizers": [bomb] * 4}}))
    assert "must not rewrite texts" in told(lambda: load_tokenizer(model))
    splitter = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(whole | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        splitter, whole["pre_tokenizer"]]}}))
    tokenizer = load_tokenizer(model)
    assert "the tokenizer's own rules fail" in told(lambda: tokenizer.encode("a" * 60 + "b"))


def test_names_cannot_move_the_cursor(capsys, tmp_path):
    from phi1.cli.main import main

    problem = dict.fromkeys(humaneval.KEYS, "") | {"task_id": "\x1b]0;owned\x07"}
    (tmp_path / "own.jsonl").write_text(2 * (json.dumps(problem) + "\n"))
    assert main(["humaneval", "--model", "none", "--out", str(tmp_path / "out"), "--problems",
                 str(tmp_path / "own.jsonl")]) == 2
    assert "there twice" in (said := "".join(capsys.readouterr()))
    assert "\x1b" not in said


def test_a_byte_order_mark_is_no_error(model):
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_bytes(b"\xef\xbb\xbf" + (model / name).read_bytes())
    load(model)
    load_tokenizer(model)
    (model / "recipe.toml").write_bytes(b"\xef\xbb\xbf[run]\nfolder = 'here'\n")
    assert read_recipe(model / "recipe.toml", {}).run.folder == "here"


def test_a_file_has_a_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert user_files.read_file(tmp_path / "file", 5) == b"12345"
    assert "larger than 4 bytes" in told(lambda: user_files.read_file(tmp_path / "file", 4))
