"""Results files, and the page, plots and comparisons that are made of them."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phi1.bench import cli as command
from phi1.bench.harness import environment
from phi1.bench.report import compare, report, results
from phi1.cli.main import main

ROOT = Path(__file__).parents[3]


def entry(provider, ms, ratio=None, status="ok", **more):
    found = {"provider": provider, "version": "1", "status": status}
    if status == "ok":
        found |= {"ms": [ms, 0.98 * ms, 1.03 * ms], "roof_share": 0.5, "error": 1e-3}
    if ratio:
        found["ratio"] = [ratio, 0.99 * ratio, 1.02 * ratio]
    return found | more


def record(case="layer_norm N=16384 D=2048 float16 forward", ms=0.05, bound="memory", **fields):
    return {"case": case, "op": "layer_norm", "unit": "kernel", "direction": "forward", "shape": {"N": 16384},
            "dtype": "float16", "bytes": 134225920, "flops": 268435456, "readme": True, "input_copies": 2,
            "roof": {"gb_per_s": 3000.0, "tflop_per_s": 700.0, "ms": 0.0447, "bound": bound},
            "providers": [entry("phi1", ms, 1.0), entry("torch", 1.5 * ms, 1.5), entry("liger", 1.2 * ms, 1.2),
                          entry("quack", 0, status="not installed", reason="quack-kernels 0.6.5 is not installed")],
            } | fields


def content(*records, device="cuda", **facts):
    found = {"device": device, "gpu": "NVIDIA H100 80GB HBM3", "driver": "550.1", "cpu": "AMD EPYC", "cores": 2,
             "threads": 2, "torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234"} | facts
    return {"format": results.FORMAT, "date": "2026-11-23", "environment": found, "settings": {},
            "cases": list(records)}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(results.as_text(value))
    return path


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


def test_compare_finds_what_moved_beyond_noise():
    a = content(record(ms=1.0), record(case="same", ms=1.0), record(case="worse", ms=1.0), record(case="gone"))
    b = content(record(ms=0.8), record(case="same", ms=1.05), record(case="worse", ms=1.2), record(case="new"))
    found = {change.case: change.verdict for change in compare.changes(a, b)}
    # Each has p80 3 % above its median: 3 % + 3 % + the floor of 1 %.
    assert found == {record()["case"]: "faster", "same": "", "worse": "slower"}


def within(before, after):
    """The verdict on two times, each (median, p20, p80)."""
    a, b = content(record()), content(record())
    for each, ms in ((a, before), (b, after)):
        each["cases"][0]["providers"][0]["ms"] = list(ms)
    (change,) = compare.changes(a, b)
    return change.verdict


def test_two_times_differ_if_they_do_by_more_than_both_noises_and_the_floor():
    """The noise of a time is the further of its p20 and p80 from its median; a GPU's floor is 1 %."""
    quiet, low, high = (100, 100, 100), (100, 96, 101), (100, 99, 103)
    assert within(quiet, (100.9, 100.9, 100.9)) == ""
    assert within(quiet, (101.2, 101.2, 101.2)) == "slower"
    assert within((101.2, 101.2, 101.2), quiet) == "faster"
    assert within(low, (104.5, 104.5, 104.5)) == ""  # 4 % and 1 %
    assert within(low, (105.5, 105.5, 105.5)) == "slower"
    assert within(high, (103.5, 103.5, 103.5)) == ""  # 3 % and 1 %
    assert within(high, (104.5, 104.5, 104.5)) == "slower"
    assert within(low, (108, 108 * 0.97, 108)) == ""  # 4 %, 3 % and 1 %: log 1.08 is 0.077
    assert within(low, (109, 109 * 0.97, 109)) == "slower"
    assert within((109, 109 * 0.97, 109), low) == "faster"


def test_compare_takes_the_ratio_to_a_peer_on_a_cpu():
    """The machine was twice as slow the second time, and phi1 beside its peer the same."""
    a, b = content(record(ms=1.0), device="cpu"), content(record(ms=2.0), device="cpu")
    (change,) = compare.changes(a, b)
    assert (change.unit, change.verdict) == ("x torch", "")
    assert change.before == pytest.approx(1 / 1.5)
    b["cases"][0]["providers"][1] = entry("torch", 2.0, 1.0)  # we take as long as the peer now
    (change,) = compare.changes(a, b)
    assert change.verdict == "slower"


def test_compare_without_a_peer_takes_the_roof_of_the_same_rounds():
    a, b = content(record(ms=1.0), device="cpu"), content(record(ms=2.0), device="cpu")
    for each in (a, b):
        del each["cases"][0]["providers"][1:]
    b["cases"][0]["roof"]["ms"] *= 2
    (change,) = compare.changes(a, b)
    assert (change.unit, change.verdict) == ("x roof", "")


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (content(record(), gpu="NVIDIA A100"), "different devices say nothing"),
        (content(record(case="else")), "no case in common"),
    ],
)
def test_compare_refuses_what_does_not_compare(other, complaint):
    with pytest.raises(ValueError, match=complaint):
        compare.changes(content(record()), other)


def test_wrong_results_do_not_compare():
    a, b = content(record()), content(record())
    b["cases"][0]["providers"][0]["status"] = "wrong"
    assert compare.changes(a, b) == []


def test_the_report_goes_between_the_markers_and_names_its_file(tmp_path):
    path = write(tmp_path / "bench/results/h100/2026-11-23-abc1234.json",
                 content(record(), record(case="x", readme=False)))
    text = report.section([path], tmp_path / "docs")
    assert "(../bench/results/h100/2026-11-23-abc1234.json)" in text
    assert f"| {record()['case']} | 0.05 [0.049-0.0515] | 2685 GB/s | 50 % | liger | 1.20 [1.19-1.22] |" in text
    assert "| x |" not in text
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.put(page, text) == f"before\n{report.BEGIN}\n{text}\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="has no lines"):
        report.put("no markers", text)


def test_the_tables_of_the_page_are_what_the_command_writes():
    page = report.PAGE.read_text(encoding="utf-8")
    block = page[page.index(report.BEGIN) + len(report.BEGIN) : page.index(report.END)].strip("\n")
    files = [report.PAGE.parent / link for link in re.findall(r"\(([\w./-]+\.json)\)", block)]
    assert files
    assert block == report.section(files)


def test_the_report_shows_what_failed():
    broken = record()
    broken["providers"][0] = entry("phi1", 0, status="wrong", reason="dx is off")
    assert report.row(broken) == f"| {broken['case']} | wrong | - | - | - | - |"


def test_plots_are_drawn_where_matplotlib_is_and_refused_in_one_line_elsewhere(tmp_path):
    """In a process that cannot import it: the page stays as it was."""
    path = write(tmp_path / "r.json", content(record()))
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    command = (f"import sys; sys.modules['matplotlib'] = None; from phi1.cli.main import main; "
               f"sys.exit(main(['bench', 'report', {str(path)!r}, '--page', {str(page)!r}]))")
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == ("phi1 bench: error: plots need matplotlib: pip install 'phi1[bench]', or --no-plots for the "
                           "tables alone\n")
    assert page.read_text() == f"{report.BEGIN}\n{report.END}\n"


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    from phi1.bench.report.plots import draw, require_matplotlib

    require_matplotlib()
    attention = [record(case=f"attention {tokens}", op="attention", bound="compute",
                        shape={"T": tokens, "K": 64, "causal": True}) for tokens in (512, 1024)]
    images = draw(write(tmp_path / "r.json", content(record(), *attention)))
    assert [image.name for image in images] == ["r-roofline.png", "r-speedup.png", "r-length.png"]
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images)


def test_a_changed_number_is_noticed(tmp_path):
    path = write(tmp_path / "r.json", content(record()))
    text = report.section([path], tmp_path)
    changed = copy.deepcopy(content(record(ms=0.06)))
    write(path, changed)
    assert report.section([path], tmp_path) != text


def test_results_of_several_commands_become_one_file_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    monkeypatch.setattr(report, "FOLDER", tmp_path / "results")
    write(tmp_path / "results" / "another" / "2026-11-01-0.json", content(record(case="on another")))
    write(tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "2026-11-24-z.json", content(record(case="of another day")))
    out = tmp_path / "out"
    quick, tuned = record(), record(ms=0.04)
    tuned["providers"] = [entry("phi1", 0.04, 1.0), entry("tuned", 0.05, 1.25), entry("torch", 9, 9.0)]
    tuned["providers"][2] |= {"status": "failed"}
    write(out / "block" / "quick.json", content(quick, record(case="other")))
    write(out / "block" / "max.json", content(tuned) | {"date": "2026-11-24"})
    write(out / "kernels" / "quick.json", content(record(case="third")))
    (out / "train.json").write_text('{"micro_batch": 24}')
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert main(["bench", "report", str(out), "--page", str(page), "--no-plots"]) == 0
    path = tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "2026-11-23-abc1234.json"
    got = {case["case"]: case for case in results.read(path)["cases"]}
    assert len(got) == 3
    rows = {row["provider"]: row for row in got[quick["case"]]["providers"]}
    assert list(rows) == ["phi1", "torch", "liger", "quack", "tuned"]
    assert rows["phi1"]["ms"][0] == 0.05
    assert rows["torch"]["status"] == "ok"
    assert rows["tuned"]["ratio"][0] == 1.25
    text = page.read_text()
    assert path.name in text
    assert "on another" in text
    assert "of another day" not in text

    shutil.rmtree(out / "block")
    write(out / "kernels" / "quick.json", content(record(case="third", ms=0.03)))
    results.gather(out)
    again = {case["case"]: case for case in results.read(path)["cases"]}
    assert again.keys() == got.keys()
    assert again["third"]["providers"][0]["ms"][0] == 0.03


def test_results_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there are no results of `phi1 bench` in"):
        results.gather(tmp_path)
    write(tmp_path / "a.json", content(record()))
    write(tmp_path / "b.json", content(record(), commit="def5678"))
    with pytest.raises(ValueError, match="several machines or commits: nvidia-h100-80gb-hbm3 at abc1234, nvidia-h100"):
        results.gather(tmp_path)
