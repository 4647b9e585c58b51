"""The provenance of a run: versions, commit, sources and CPU, and the changes between two starts."""

import subprocess

import pytest
import torch

import phi1.kernels
from phi1.train.runtime import provenance
from phi1.train.runtime.engine import Engine
from phi1.train.runtime.provenance import changed, commit, versions


def test_changes_between_two_starts():
    before = {"train": {"lr": 1e-3, "steps": 10}, "run": {"folder": "a"}}
    now = {"train": {"lr": 1e-3, "steps": 20, "clip": 1.0}}
    assert changed(before, now) == {"run.folder": ["a", None], "train.clip": [None, 1.0], "train.steps": [10, 20]}
    assert changed(now, now) == {}


def test_versions_and_commit_are_those_of_this_process():
    assert versions()["torch"] == torch.__version__
    head = commit()
    assert head is None or len(head.removesuffix("+changes")) >= 7


@pytest.mark.parametrize("name", ["new.py", "tuned/op.json", "tuned/gpus/one.json"])
def test_a_change_of_the_code_is_another_environment(tmp_path, monkeypatch, name):
    def now():
        provenance.sources.cache_clear()
        return Engine(torch.device("cpu"), "fp32", 1, 1).environment()["phi1"]

    monkeypatch.setattr(phi1.kernels, "__path__", [str(tmp_path)])
    found = [now(), now()]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in ("1", "2"):
        path.write_text(text)
        found.append(now())
    path.rename(path.with_stem("renamed"))
    found.append(now())
    provenance.sources.cache_clear()
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_the_cpu_is_more_than_its_architecture():
    assert torch.backends.cpu.get_cpu_capability() in provenance.cpu()
    assert provenance.cpu().split()[0] not in ("", torch.backends.cpu.get_cpu_capability())


def test_a_repository_around_an_installation_is_not_its_commit(tmp_path, monkeypatch):
    inside = tmp_path / "venv" / "provenance.py"
    inside.parent.mkdir()
    inside.write_text("")
    commands = "init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m a"
    for words in map(str.split, commands):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    monkeypatch.setattr(provenance, "__file__", str(inside))
    assert commit() is None
    subprocess.run(["git", "-C", tmp_path, "add", inside], check=True)
    assert commit()
