"""Results files, and the page, plots and comparisons that are made of them."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from bench_results import content, record, write

from phi1.bench import cli as command
from phi1.bench.harness import environment
from phi1.bench.report import report, results
from phi1.cli.main import main

ROOT = Path(__file__).parents[3]


def test_a_file_is_read_as_it_was_written(tmp_path):
    value = content(record(), record(case="other", ms=1))
    assert results.read(write(tmp_path / "r.json", value)) == value


def test_a_file_has_a_line_for_each_provider(tmp_path):
    text = results.as_text(content(record()))
    assert sum('"provider": "' in line for line in text.splitlines()) == 4
    assert len(text.splitlines()) < 20


def test_every_case_is_on_the_disk_before_the_next(tmp_path):
    path = tmp_path / "deep" / "r.json"
    file = results.ResultsFile(path, content()["environment"], {})
    assert results.read(path)["cases"] == []
    file.add(record())
    assert [case["op"] for case in results.read(path)["cases"]] == ["layer_norm"]
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


@pytest.fixture
def benchmark_saved(tmp_path, monkeypatch):
    """`phi1 bench --save` with one made-up case, in the midst of which something else happens."""
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setenv(environment.COMMIT_VARIABLE, "abc1234")

    def save(name, meanwhile=lambda: None):
        def measure(cases, runner, file, minutes):
            meanwhile()
            if name:
                file.add(record(case=name))
            return []

        monkeypatch.setattr(command, "measure", measure)
        assert main(["bench", "--save", "--op", "gelu", "--device", "cpu"]) == 0

    return save


def saved(folder):
    """The cases of each file in the folder of a machine, the oldest file first."""
    (machine,) = (folder / "results").iterdir()
    paths = sorted(machine.iterdir(), key=lambda path: path.stem)
    return [(path.name.partition("-abc1234")[2], results.read(path)["cases"][0]["case"]) for path in paths]


def test_runs_of_one_day_and_commit_keep_their_results(tmp_path, monkeypatch, benchmark_saved, capsys):
    benchmark_saved("")
    assert capsys.readouterr().err == "", "a run without a case has no file"
    benchmark_saved("first")
    assert "results written to" in capsys.readouterr().err
    benchmark_saved("third", meanwhile=lambda: benchmark_saved("second, while the third measures"))
    assert saved(tmp_path) == [(".json", "first"), (".2.json", "second, while the third measures"),
                               (".3.json", "third")]
    said = capsys.readouterr().err.splitlines()
    assert [line.partition("-abc1234")[2] for line in said] == [".2.json", ".3.json"]
    monkeypatch.setattr(report, "FOLDER", tmp_path / "results")
    assert [path.name.partition("-abc1234")[2] for path in report.newest()] == [".3.json"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_NONBLOCK), "rb", buffering=0) as pipe:
        results.ResultsFile(path, {"gpu": "x"}, {})
        assert json.loads(pipe.read(1 << 16))["cases"] == []
    assert path.is_fifo()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"benchmark": "cpu_training"}', '{"format": "phi1 bench 99"}'])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a results file"):
        results.read(path)


def removed(*keys):
    """A file's contents without what lies below these keys."""
    inner = value = content(record())
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return value


@pytest.mark.parametrize(("value", "lacks"), [
    ({"format": results.FORMAT}, "date"),
    (content() | {"cases": {}}, "cases"),
    (removed("environment"), "environment"),
    (removed("environment", "torch"), "environment.torch"),
    (removed("environment", "gpu"), "environment.gpu"),
    (removed("cases", 0, "readme"), "cases[0].readme"),
    (content("x"), "cases[0].case"),
    (removed("cases", 0, "providers", 1, "status"), "cases[0].providers[1]: provider or status"),
])
@pytest.mark.parametrize("words", [["report", "--no-plots", "--print"], ["compare", "OTHER"]])
def test_a_file_that_lacks_something_is_one_line(tmp_path, capsys, value, lacks, words):
    path, other = tmp_path / "r.json", write(tmp_path / "other.json", content(record()))
    path.write_text(json.dumps(value))
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main(["bench", *[str(other) if word == "OTHER" else word for word in words], str(path)]))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"phi1 bench {words[0]}: error: ")
    assert err.endswith(f"{path} is not a whole results file of `phi1 bench`: it lacks {lacks}\n")
    assert (out, err.count("\n")) == ("", 1)


def test_the_place_of_a_machines_results():
    facts = content()["environment"]
    assert results.standard_path(facts).parent == ROOT / "bench/results/nvidia-h100-80gb-hbm3"
    assert results.standard_path(facts).name.endswith("-abc1234.json")
    assert environment.machine_name(facts | {"device": "cpu"}) == "cpu-amd-epyc-2c"


def test_the_commit_comes_from_the_variable_or_git_or_is_unknown(monkeypatch, tmp_path):
    monkeypatch.setenv(environment.COMMIT_VARIABLE, "1234abc")
    assert environment.commit() == "1234abc"
    monkeypatch.delenv(environment.COMMIT_VARIABLE)
    inside = tmp_path / "venv" / "phi1"
    (inside / "bench" / "harness").mkdir(parents=True)
    (inside / "bench" / "harness" / "environment.py").touch()
    for words in ("init -q", "-c user.name=a -c user.email=a@b commit -q --allow-empty -m a"):
        subprocess.run(["git", "-C", tmp_path, *words.split()], check=True)
    monkeypatch.setattr(environment, "ROOT", inside)
    assert environment.commit() == "unknown", "of a repository around the installation"
    subprocess.run(["git", "-C", tmp_path, "add", inside], check=True)
    assert len(environment.commit()) >= 7
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.commit() == "unknown", "no git on this machine"


def test_the_environment_says_what_numbers_depend_on():
    facts = environment.environment("cpu")
    assert {"device", "cpu", "cores", "threads", "torch", "triton", "commit", "python", "peers"} <= set(facts)
    assert all(version for version in facts["peers"].values())
