"""`phi1 ledger` on ledgers of the trainer's own writer, and on files that are no ledger."""

import importlib.util
import json

import pytest

from phi1.cli.main import main
from phi1.train.metrics.ledger import Ledger
from phi1.train.step.trainer import Outcome


@pytest.fixture
def run(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", 0)
    ledger.start({"finished": 0}, {"train": {"lr": 0.1}})
    for step in range(1, 41):
        skipped = step in (7, 30)
        outcome = Outcome(step, float("nan") if skipped else 4 - step / 40, 0.1, 1.0, 1.0, skipped, "00")
        ledger.step(outcome, {"tokens_per_s": 1000.0 + step, "seconds": 2.0, "memory_gib": 1.5, "mfu": 0.5,
                              "mfu_causal": 0.46})
        if step % 20 == 0:
            ledger.evaluation(step, {"loss": 3.5 + step / 100, "bits_per_byte": 2.0})
            ledger.saved(step, {"bytes": 10, "stall_seconds": 0.1, "seconds": 0.5})
    ledger.close()
    again = Ledger(tmp_path / "ledger.jsonl", 40)
    again.start({"finished": 40}, {"train": {"lr": 0.2}})
    again.close()
    return tmp_path


def test_the_summary(run, capsys):
    assert main(["ledger", str(run)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "steps         1 to 40, 2 starts, 1:20 in steps"
    assert out[1] == "training loss 3.2500, mean of the last 20 steps"
    assert out[2] == "skipped       2, the last at step 30"
    assert out[3] == "speed         1,020 tokens/s, median; MFU 50.0 %, 46.0 % with causal attention halved"
    assert out[4] == "memory        1.50 GiB at most, rank 0"
    assert out[5] == "validation    loss 3.9000 after step 40; best 3.7000 after step 20"
    assert out[6] == "changed       after step 40: train.lr was 0.1, is 0.2"
    assert out[7].startswith("made with     python 3.")


def test_the_plot_or_what_it_needs(run, tmp_path, capsys):
    picture = tmp_path / "run.png"
    if importlib.util.find_spec("matplotlib"):
        assert main(["ledger", str(run / "ledger.jsonl"), "--plot", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        return
    with pytest.raises(SystemExit):
        main(["ledger", str(run), "--plot", str(picture)])
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err


STEP = {"step": 1, "loss": 2.5, "skipped": False, "measured": {"seconds": 0.1, "tokens_per_s": 100.0}}
NO_LINES = ["3", "null", "[]", '"step"', *map(json.dumps, [
    {"step": 1}, STEP | {"step": "1"}, STEP | {"loss": "2"}, {key: STEP[key] for key in STEP if key != "skipped"},
    STEP | {"measured": None}, STEP | {"measured": {"tokens_per_s": 100.0}}, STEP | {"measured": {"seconds": 0.1}},
    STEP | {"measured": STEP["measured"] | {"seconds": float("inf")}},
    STEP | {"measured": STEP["measured"] | {"memory_gib": "much"}}, STEP | {"eval": 3}, {"eval": {"step": 20}},
    {"eval": {"step": 20, "loss": [1.0]}}, {"humaneval": {"step": 20}}, {"start": 3}, {"start": {"changed": {}}},
    {"start": {"finished": 0, "changed": {"train.lr": 0.1}}}, {"start": {"finished": 0, "versions": "3.11"}},
])]


@pytest.mark.parametrize("line", [STEP, STEP | {"loss": None}, STEP | {"later": "versions may add"}])
def test_a_ledger_of_one_step_is_one(line, tmp_path, capsys):
    (tmp_path / "ledger.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({"later": 1}) + "\n")
    assert main(["ledger", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("steps         1 to 1, 0 start, 0:00 in steps")


def test_an_evaluation_that_is_not_finite_is_reported_so(run, tmp_path, capsys):
    ledger = Ledger(run / "ledger.jsonl", 40)
    ledger.evaluation(41, {"loss": float("nan"), "bits_per_byte": float("nan")})
    ledger.close()
    assert main(["ledger", str(run)]) == 0
    assert "validation    loss not finite after step 41; best 3.7000 after step 20\n" in capsys.readouterr().out
    (tmp_path / "none.jsonl").write_text(json.dumps(STEP) + '\n{"eval": {"step": 1, "loss": null}}\n')
    assert main(["ledger", str(tmp_path / "none.jsonl")]) == 0
    assert "validation    loss not finite after step 1\n" in capsys.readouterr().out


@pytest.mark.parametrize(("content", "message"), [
    (None, "ledger.jsonl: No such file or directory"),
    ("", "ledger.jsonl: no step has been finished yet"),
    ("{]\n", "ledger.jsonl: not a ledger: "),
    ("[" * 100_000 + "\n", "ledger.jsonl: not a ledger: "),
    *((line + "\n", "ledger.jsonl: not a ledger: line 1 is not as the trainer writes it") for line in NO_LINES),
])
def test_a_file_that_is_no_ledger_is_one_line(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "ledger.jsonl").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["ledger", str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.splitlines()) == 1
