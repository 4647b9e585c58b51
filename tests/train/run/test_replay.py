"""`--prove-resume` and `--bitwise`: proofs, differences and refusals; the run's folder stays as it is."""

import json
import re
import shutil

import pytest
from training_runs import error_line, run, start, steps

from phi1.train.checkpoint.files import describe, write_manifest
from phi1.train.recipe.command_line import parse
from phi1.train.runtime.launch import RunError


def contents(folder):
    """Return the bytes of every file except the lock."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(("name", "processes"), [("whole", 0), ("pair", 2)])
def test_the_last_steps_give_the_same_bits_again(place, uninterrupted, uninterrupted_pair, name, processes):
    before = contents(place / name)
    done = run(place, name, processes, run__prove_resume=13)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^proven: steps 41 to 60 of {name}, run again from step-40, gave the ledger's", done.stdout,
                     re.MULTILINE), done.stdout
    assert contents(place / name) == before


def test_a_difference_is_named(place, uninterrupted):
    shutil.copytree(place / "whole", place / "doubted")
    ledger = place / "doubted" / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if line.startswith('{"step": 47'))
    lines[at] = lines[at].replace('"lr": 0.', '"lr": 1.')
    ledger.write_text("".join(lines))
    done = run(place, "doubted", run__prove_resume=20)
    assert done.returncode == 1
    assert re.search(r"^not proven: steps 41 to 60 of doubted: lr of step 47 was 1\.\d+, is 0\.\d+$", done.stdout,
                     re.MULTILINE), done.stdout

    restart = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "1",
               "TORCHELASTIC_ERROR_FILE": str(place / "cause.json")}
    again = start(place, "doubted", environment=restart, run__prove_resume=20)
    assert again.communicate() == ("", "")  # attempt 0 has printed the error
    assert again.returncode == 2
    assert f"error: {done.stdout.strip()}" in (place / "cause.json").read_text()

    lines[at] = lines[at].replace('"lr": 1.', '"lr": 0.')
    ledger.write_text("".join(lines))
    newest = place / "doubted" / "checkpoints" / "step-60"
    state = json.loads((newest / "trainer.json").read_text())
    (newest / "trainer.json").write_text(json.dumps(state | {"skipped": 1}))
    write_manifest(newest, {path.name: describe(path) for path in newest.iterdir() if path.name != "manifest.json"})
    done = run(place, "doubted", run__prove_resume=1)
    assert done.returncode == 1
    assert re.search(r"the losses agree, but the state's hash was [0-9a-f]{16}, is [0-9a-f]{16}$", done.stdout,
                     re.MULTILINE), done.stdout


def test_a_proof_or_bitwise_resume_that_is_impossible_is_refused(place, uninterrupted):
    before = contents(place / "whole")
    line = error_line(run(place, "whole", run__prove_resume=21))
    assert ("--prove-resume 21 needs a checkpoint as many steps before the newest in whole/checkpoints; there: "
            "step-40, step-60; ") in line
    shutil.copytree(place / "whole", place / "torn")
    with open(place / "torn" / "ledger.jsonl", "a") as file:
        file.write('{"step": 61, "lo\n')
    assert "--prove-resume: torn/ledger.jsonl cannot be read: " in error_line(run(place, "torn", run__prove_resume=20))
    line = error_line(run(place, "whole", run__prove_resume=20, train__threads=2))
    assert "step-40 cannot go on bit for bit here: threads was 1, is 2; give what it was" in line
    line = error_line(run(place, "whole", train__steps=70, run__bitwise="true", train__precision="bf16"))
    assert "step-60 cannot go on bit for bit here: precision was fp32, is bf16; give what it was, or leave" in line
    assert contents(place / "whole") == before
    assert len(steps(place, "whole")) == 60


def test_the_short_forms_stand_for_keys():
    recipe = parse(["--bitwise", "--prove-resume", "5", "--train.steps", "9"])
    assert (recipe.run.bitwise, recipe.run.prove_resume, recipe.train.steps) == (True, 5, 9)
    assert parse(["--prove-resume=7"]).run.prove_resume == 7
    for words, problem in ((["--prove-resume"], "--prove-resume needs a value"),
                           (["--bitwse"], "'bitwse' is not a key; the nearest is run.bitwise")):
        with pytest.raises(RunError, match=problem):
            parse(words)
