"""The table of the compiler's results: what makes a row stale, and what `--check` and `--sample` refuse."""

import ast
import importlib.util
import os
import sys
from dataclasses import replace

import pytest

if sys.platform != "linux" or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("Triton compiles on Linux, and not in its interpreter", allow_module_level=True)


from phi1.bench.compile import allowed, report, table
from phi1.bench.compile import key as static_key
from phi1.bench.compile.arch import ARCHS, Report
from phi1.bench.compile.launches import Case
from phi1.bench.harness.counting import Launch

SOURCE = '''
import triton
import triton.language as tl
SCALE = tl.constexpr(2.0)

@triton.jit
def double(x):
    return x * SCALE

@triton.jit
def copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Copies."""
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, double(tl.load(x_ptr + offs)))
'''
REPORT = Report(registers=32, shared=1024, warps=4, loads={16: 2, 4: 1}, stores={16: 2})


def copy_case(folder, source=SOURCE, **changes):
    """A case of the kernel in `source`, which has to lie in a file."""
    path = folder / f"kernel{len(list(folder.iterdir()))}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"kernel_under_test{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launch = Launch("copy_kernel", module.copy_kernel, {"x_ptr": "*fp16", "y_ptr": "*fp16"}, {"BLOCK": 256},
                    ("x_ptr", "y_ptr"), {"num_warps": 4, "num_stages": 3})
    return Case("copy", replace(launch, **changes))


def key(case):
    return static_key.key_of(case.launch, "sm_90")


@pytest.mark.parametrize(
    ("old", "new"),
    [('"""Copies."""', '"""Copies all."""'), ("    offs =", "    # all of them\n\n    offs ="),
     ("@triton.jit\ndef double", "# moved\n\n\n@triton.jit\ndef double"), ("", "")],
    ids=["docstring", "comment", "line", "another file"],
)
def test_what_changes_no_code_changes_no_key(tmp_path, old, new):
    assert key(copy_case(tmp_path)) == key(copy_case(tmp_path, SOURCE.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new"),
    [("y_ptr + offs", "y_ptr + offs + 1"), ("x * SCALE", "x + SCALE"), ("constexpr(2.0)", "constexpr(3.0)")],
    ids=["kernel", "callee", "constant"],
)
def test_what_changes_the_code_changes_the_key(tmp_path, old, new):
    assert key(copy_case(tmp_path)) != key(copy_case(tmp_path, SOURCE.replace(old, new)))


@pytest.mark.parametrize(
    "changes",
    [{"options": {"num_warps": 8, "num_stages": 3}}, {"options": {"num_warps": 4, "num_stages": 2}},
     {"options": {"num_warps": 4}}, {"constants": {"BLOCK": 512}}, {"aligned": ("y_ptr",)},
     {"types": {"x_ptr": "*bf16", "y_ptr": "*bf16"}}],
    ids=["warps", "stages", "no stages", "constant", "alignment", "types"],
)
def test_another_specialisation_has_another_key(tmp_path, changes):
    assert key(copy_case(tmp_path)) != key(copy_case(tmp_path, **changes))


def test_a_name_is_no_part_of_the_key(tmp_path):
    case = copy_case(tmp_path)
    assert key(case) == key(replace(case, name="other", candidate=True))


def test_another_target_has_another_key(tmp_path):
    assert len({static_key.key_of(copy_case(tmp_path).launch, arch) for arch in ARCHS}) == len(ARCHS)


@pytest.mark.parametrize(("old", "new", "same"), [
    (r"LDL|STL", r"LDL", False),
    ("options=dict(options)", "options={}", False),
    ("# Without the alignment", "# Lacking the alignment", True),
    ('"""Compile one launch', '"""Compiles one launch', True),
    ("cuobjdump says nothing of registers", "cuobjdump is silent about registers", True),
], ids=["what a spill is", "an option", "a comment", "the docstring", "a message"])
def test_how_the_compiler_is_called_and_read_is_part_of_the_key(tmp_path, monkeypatch, old, new, same):
    case, reader = copy_case(tmp_path), tmp_path / "reader.py"
    before, text = key(case), static_key.READER.read_text()
    assert old in text
    reader.write_text(text.replace(old, new))
    monkeypatch.setattr(static_key, "READER", reader)
    assert (key(case) == before) == same


def test_the_key_is_the_same_under_every_python():
    # Of all that is written there, Python's versions print f-strings alone in different ways.
    assert not [node for node in ast.walk(ast.parse(static_key._meaning(static_key.READER)))
                if isinstance(node, ast.JoinedStr)]


def test_rows_come_back_as_they_were_written_and_other_versions_stay(tmp_path):
    case, path = copy_case(tmp_path), tmp_path / "table.json"
    table.save("3.9.0", {"sm_90": {"copy": table.row_of(case, "sm_90", REPORT)}}, path)
    table.save("3.6.0", {"sm_80": {"copy": table.row_of(case, "sm_80", Report(error="no"))}}, path)
    assert table.report_of(table.load("3.9.0", path)["sm_90"]["copy"]) == REPORT
    assert table.report_of(table.load("3.6.0", path)["sm_80"]["copy"]) == Report(error="no")
    assert table.load("3.8.0", path) == {}
    assert len([line for line in path.read_text().splitlines() if '"key"' in line]) == 2


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """`phi1 bench static --check` over a table of its own, which starts fresh and without complaints."""
    case = copy_case(tmp_path)
    path = tmp_path / "table.json"
    rows = {arch: {"copy": table.row_of(case, arch, REPORT)} for arch in ARCHS}
    monkeypatch.setattr(table, "cases", lambda arch: [case])
    monkeypatch.setattr(report, "load", lambda version: table.load(version, path))
    known = allowed.parsed({"copy": {"narrow_loads": {"reason": "a test's"} | dict.fromkeys(ARCHS, 1)}})
    monkeypatch.setattr(report, "allowed", lambda: known)
    monkeypatch.setattr(allowed, "allowed", lambda: known)

    def check(change=None, versions=table.VERSIONS, words=("--arch", "sm_90")):
        for version in versions:
            changed = {arch: {name: dict(row) for name, row in named.items()} for arch, named in rows.items()}
            if change:
                change(changed)
            table.save(version, changed, path)
        code = report.main(["--check", *words])
        return code, capsys.readouterr().out

    return check


@pytest.mark.parametrize(("loads", "code"), [({"16": 2, "4": 1}, 0), ({"16": 3}, 1)])
def test_what_is_allowed_and_not_needed_fails_where_the_whole_table_is_checked(checked, loads, code):
    change = [row for row in ARCHS if row != "sm_80"]
    found, out = checked(lambda rows: [rows[arch]["copy"].update(loads=loads) for arch in change], words=())
    assert found == code
    assert ("allows narrow_loads 1 of copy on sm_90, and 0 is needed; --accept mends it" in out) == bool(code)
    assert "sm_80" not in out
    assert checked(lambda rows: rows["sm_90"]["copy"].update(loads=loads))[0] == 0, "a part cannot know"


def test_a_fresh_table_passes_without_compiling(checked, monkeypatch):
    monkeypatch.setattr(report, "compile_all", None)
    code, out = checked()
    assert code == 0
    assert out.splitlines()[-1] == "static gate, Triton 3.9.0 and 3.6.0: all 2 pass"


def test_a_stale_key_fails_and_says_how_to_mend_it(checked):
    code, out = checked(lambda rows: rows["sm_90"]["copy"].update(key="0" * 12))
    assert code == 1
    assert out.count("1 of 1 are stale: copy on sm_90;") == 2
    assert "phi1 bench static --update" in out


def test_a_version_that_is_not_in_the_table_is_stale(checked):
    code, out = checked(versions=["3.9.0"])
    assert code == 1
    assert "Triton 3.6.0: 1 of 1 are stale: copy on sm_90" in out
    assert "Triton 3.9.0:" not in out


@pytest.mark.parametrize(
    ("values", "complaint"),
    [({"stack": 8}, "spills 8 bytes a thread"), ({"shared": 232_449}, "shared memory, over 232448"),
     ({"loads": {"16": 2, "4": 2}}, "2 global loads under 16 bytes, 1 allowed"), ({"error": "no"}, "does not compile")],
    ids=["spill", "shared", "narrow", "error"],
)
def test_a_refused_kernel_in_the_table_fails(checked, values, complaint):
    code, out = checked(lambda rows: rows["sm_90"]["copy"].update(values))
    assert code == 1
    assert complaint in out


def test_a_case_that_is_gone_is_reported(tmp_path):
    case = copy_case(tmp_path)
    row = table.row_of(case, "sm_90", REPORT)
    rows = {"sm_90": {"copy": row, "gone": row}}
    assert table.left_over(rows, [("sm_90", case)]) == ["gone on sm_90"]


@pytest.mark.parametrize("words", [["--update"], ["--update", "--arch", "sm_90"]], ids=["whole", "part"])
def test_an_update_keeps_what_another_has_written_while_it_compiled(checked, tmp_path, monkeypatch, words):
    path, version = tmp_path / "table.json", report.triton.__version__
    checked(lambda rows: rows["sm_90"].update(gone={"key": "1"}, copy={"key": "stale"}), [version])

    def compile_all(jobs, processes):
        table.save(version, {"sm_80": {"copy": {"key": "theirs"}}}, path)
        return [(job, REPORT) for job in jobs]

    monkeypatch.setattr(report, "save", lambda *rows, **known: table.save(*rows, path, **known))
    monkeypatch.setattr(report, "compile_all", compile_all)
    assert report.main(words) == 0
    rows = table.load(version, path)
    assert rows["sm_80"]["copy"] == {"key": "theirs"}
    assert table.report_of(rows["sm_90"]["copy"]) == REPORT
    assert ("gone" in rows["sm_90"]) == ("--arch" in words)


def test_the_whole_table_is_of_both_versions():
    for version in table.VERSIONS:
        assert set(table.load(version)) == set(ARCHS), f"{version} of the committed table"


def test_a_version_that_the_table_lacks_is_said_before_all_is_compiled(checked, monkeypatch, capsys):
    monkeypatch.setattr(report, "load", lambda version: {})
    monkeypatch.setattr(report, "compile_all", lambda jobs, workers: [(job, REPORT) for job in jobs])
    monkeypatch.setattr(report.triton, "__version__", "3.7.1")
    assert report.main(["--arch", "sm_90"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("the table has no Triton 3.7.1, so all is compiled; --check compiles nothing")
    assert "compiling 1 of 1, 2 at once, about 1 min" in out
