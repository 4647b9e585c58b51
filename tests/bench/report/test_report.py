"""`phi1 bench report`: the page's tables, the plots, and results gathered from a folder."""

import copy
import re
import shutil
import sys

import pytest
from bench_results import content, entry, record, write

from phi1.bench.report import report, results
from phi1.cli.main import main


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


def test_without_matplotlib_plots_are_refused_in_one_line_and_the_page_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write(tmp_path / "r.json", content(record()))
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert main(["bench", "report", str(path), "--page", str(page)]) == 2
    assert capsys.readouterr().err == "phi1 bench report: error: plots need matplotlib: " \
                                      "pip install 'phi1[bench]', or --no-plots for the tables alone\n"
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
    assert path.with_name(f"{path.stem}-train.json").read_text() == '{"micro_batch": 24}'
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
