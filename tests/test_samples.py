"""What a model under training writes, and that writing it changes nothing."""

import pytest

from phi1.train.samples import function_headers
from phi1.train.testing import run, steps, train, weights


def test_completions_are_written_and_change_no_bit(place, undisturbed):
    train(place, "sampled", eval__completions_every=20, eval__completions=2)
    assert sorted(path.name for path in (place / "sampled" / "samples").iterdir()) == ["step-20.md", "step-40.md"]
    early, late = ((place / "sampled" / "samples" / f"step-{step}.md").read_text() for step in (20, 40))
    assert early.startswith("# Step 20\n\nTemperature 0.7, seed 1.\n\n```python\ndef scale_")
    headers = [line for line in early.split("\n") if line.startswith("def ")]
    assert len(headers) == 2
    assert [line for line in late.split("\n") if line.startswith("def ")] == headers
    assert early.replace("20", "40") != late
    assert steps(place, "sampled") == steps(place, "whole")
    assert weights(place, "sampled") == weights(place, "whole")


def test_two_processes_write_once_and_keep_their_bits(place):
    short = {"train__steps": 12, "checkpoint__every": 0, "eval__completions": 1}
    train(place, "pair", 2, **short)
    train(place, "pair-sampled", 2, eval__completions_every=5, eval__every=5, **short)
    assert sorted(path.name for path in (place / "pair-sampled" / "samples").iterdir()) == ["step-10.md", "step-5.md"]
    assert steps(place, "pair-sampled") == steps(place, "pair")
    assert weights(place, "pair-sampled") == weights(place, "pair")


@pytest.mark.parametrize("trouble", ["nan", "disk"])
def test_completions_that_fail_do_not_end_the_run(place, trouble):
    changes = {"train__lr": "1e30", "train__clip": 0} if trouble == "nan" else {}
    name, reason = f"sampling-{trouble}", {"nan": "logits hold nan", "disk": "File exists"}[trouble]
    if trouble == "disk":
        (place / name).mkdir()
        (place / name / "samples").write_text("in the way")
    done = run(place, name, train__steps=6, train__warmup_steps=0, eval__completions_every=3, **changes)
    warning = next(line for line in done.stdout.splitlines() if line.startswith("warning: the completions of step 3"))
    assert reason in warning
    assert warning.endswith("; the run goes on")
    assert steps(place, name)[-1]["step"] == 6


def test_headers_with_a_docstring_come_first_and_are_spread():
    text = "".join(f'def f{i}(x):\n    """Return what belongs to {i}."""\n    return x\n\ndef g{i}(x):\n    pass\n\n'
                   for i in range(9)).encode()
    assert [header.split("(")[0] for header in function_headers(text, 3)] == ["def f0", "def f3", "def f6"]
    assert [header.split("(")[0] for header in function_headers(text, 11)][9:] == ["def g0", "def g4"]
    assert function_headers(b"x = 1\n", 3) == []
