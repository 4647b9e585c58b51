"""The README has no measured number that is not in a results file which it names.

A table of measurements is, line by line, what its file gives. Elsewhere each ratio, rate, share and time, and each
number with a decimal point, is in a file that its paragraph names, or in NOT_MEASURED with what it is instead.
"""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from phi1.bench.report import report

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRAINING = re.compile(r"\((bench/results/[\w./+-]+\.json)\)\):\n\n(\| vocabulary \|(?:[^\n]+\n)+)")
LINK = re.compile(r"\]\((bench/results/[\w./+-]+\.json)\)")

NOT_MEASURED = {
    "(1.3 B parameters": "published, of phi-1",
    "about 5 minutes": "how long to wait for the first run, to the minute",
    "50.3 B tokens": "24,000 steps of 1,024 sequences of 2,048 tokens",
    "finetuning (3.15 B tokens": "6,000 steps of 256 sequences of 2,048 tokens",
    "`run.watchdog`, 1,800 s,": "a default",
    "what has not stopped after 30 s": "torchrun's own limit",
    "keeps 18.1 D bytes": "counted; tests hold it to the tensors that are kept",
    "(10.1 D)": "likewise",
    "phi-1 keeps 1.71 GiB": "likewise",
    "holds 1.80 GiB (1.82 with dropout": "likewise",
    "2-5 s a kernel": "how long to wait for a compiler",
    "1.5 times the roof": "a limit",
    "within 0.5 % of float32": "a bound, which a test holds",
}
"""What the README says -> what it is, where it is no measured speed."""

OTHER_TABLES = {
    "| folder | imports as | what lives there |": "has no numbers",
    "| operation | fused into it | saved for the backward | bytes forward | flops forward |": "formulas over sizes",
}
"""First lines of the tables that no results file backs -> why."""

# Names and versions, whose numbers nobody has measured: code, links, dates, phi-1.5, torch 2.13.0, sm_90.
NAMES = re.compile(r"`[^`]*`|\]\([^)]*\)|\d{4}-\d\d-\d\d|[A-Za-z_]+[-_]\d[\w.]*|"
                   r"\b(?:torch|transformers|Triton)\s\d[\w.+]*(?: and \d\.\d)?", re.ASCII)
UNITS = (r"x\b(?! \d)|times\b|%|(?:tokens|samples|steps|[kMGT]?B|[MGT]?FLOP)/s|"
         r"(?:ms|us|s|h|seconds?|minutes?|hours?|days?)\b")
CLAIM = re.compile(rf"(?<![\w.])(\d[\d,]*(?:\.\d+)?)(?:(?:-| to )\d[\d,.]*)? ?({UNITS})|(?<![\w.])(\d[\d,]*\.\d+)")


def blocks(readme):
    """Paragraphs, items of lists, tables and pieces of code, each as it stands."""
    return [part.strip("\n") for part in re.split(r"\n\s*\n|\n(?=- )", readme) if part.strip()]


def prose(block):
    """What a block says in words: of code its comments, and nothing of a table."""
    lines = block.splitlines()
    if any(line.startswith("```") for line in lines):
        lines = [line.partition("# ")[2] for line in lines]
    return " ".join(line for line in lines if not line.startswith("|"))


def measured(block):
    """Ratios and rates of the results files that a block names, as text with any number of digits."""
    numbers = {"": [], "tokens/s": []}
    for path in LINK.findall(block):
        for row in json.loads((ROOT / path).read_text()).get("rows", []):
            for key, value in row.items():
                kind = "tokens/s" if key.endswith("tokens_per_s") else "" if "ratio" in key else None
                if kind is not None:
                    numbers[kind] += value if isinstance(value, list) else [value]
    return numbers


def unsupported(readme):
    """What the README says outside of its tables without a results file or a reason."""
    readme = before_and_after(readme)
    for said in NOT_MEASURED:
        readme = " ".join(readme.split(said)) if said in readme else readme
    found = []
    for block in blocks(readme):
        numbers = measured(block)
        for amount, unit, bare in CLAIM.findall(NAMES.sub(" ", prose(block))):
            text = (amount or bare).replace(",", "")
            known = numbers["tokens/s" if unit == "tokens/s" else ""] if unit in ("", "x", "times", "tokens/s") else []
            if not any(f"{number:.{len(text.partition('.')[2])}f}" == text for number in known):
                found.append(f"{amount or bare} {unit}".strip())
    return found


def before_and_after(readme):
    """The README without what `phi1 bench report` writes, which is compared as a whole."""
    begin, end = readme.index(report.BEGIN), readme.index(report.END)
    return f"{readme[:begin]}\n\n{readme[end + len(report.END):]}"


def training_table(path):
    """The README's table of a results file of bench/cpu_training.py."""
    lines = ["| vocabulary | tokens/s, phi1 / transformers | ratio, median [p20-p80] | peak memory, ratio |",
             "|---|---|---|---|"]
    for row in json.loads((ROOT / path).read_text())["rows"]:
        low, high = row["ratio_p20_p80"]
        lines.append(f"| {row['vocab_size']:,} | {row['phi1_tokens_per_s']:,} / {row['transformers_tokens_per_s']:,} | "
                     f"{row['ratio_median']:.2f} [{low:.2f}-{high:.2f}] | {row['memory_ratio']:.2f} |")
    return "\n".join(lines) + "\n"


def faults_text():
    """What tests/train/run/test_faults.py writes for tests/train/run/faults.json."""
    spec = importlib.util.spec_from_file_location("faults", ROOT / "tests" / "train" / "run" / "test_faults.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.table(json.loads(module.RESULTS.read_text()))


def generated(readme):
    paths = [ROOT / path for path in dict.fromkeys(LINK.findall(between(readme, report.BEGIN, report.END)))]
    assert paths
    return report.section(paths)


def between(readme, begin, end):
    return readme[readme.index(begin) + len(begin) : readme.index(end)]


def wrong_tables(readme):
    """First lines of tables that are not what their results give, or that nothing backs."""
    found = ["the report"] if generated(readme) != between(readme, report.BEGIN, report.END).strip("\n") else []
    faults = between(readme, "<!-- faults: begin -->\n", "<!-- faults: end -->")
    found += ["the faults"] if faults != faults_text() else []
    rest = before_and_after(readme).replace(faults, "\n\n")
    for path, table in TRAINING.findall(rest):
        found += [table.partition("\n")[0]] if table != training_table(path) else []
        rest = rest.replace(table, "\n\n")
    tables = [block for block in blocks(rest) if re.search(r"^\|", block, re.MULTILINE)]
    return found + [head for table in tables if (head := table.partition("\n")[0]) not in OTHER_TABLES]


def test_every_measured_number_of_the_readme_is_in_a_file_that_it_names():
    assert unsupported(README) == []
    assert wrong_tables(README) == []
    assert "](tests/train/run/faults.json)" in README


def test_what_is_not_measured_is_still_said():
    """The list holds nothing that the README does not say any more."""
    assert [said for said in (*NOT_MEASURED, *OTHER_TABLES) if said not in README] == []
    assert len(TRAINING.findall(README)) == 1


SAID = {
    "a changed number": ("the ratios are 1.18 and", "the ratios are 1.28 and", ["1.28"]),
    "a number of a file of another paragraph": ("the ratios are 1.18 and", "the ratios are 1.97 and", ["1.97"]),
    "an invention": ("No speed was measured on a GPU yet.", "phi1 is 7.3x faster (2,000 tokens/s).",
                     ["7.3 x", "2,000 tokens/s"]),
    "an invention in a list": ("- Nothing was run on a GPU:", "- Training is 3 times as fast, and saves 40 %:",
                               ["3 times", "40 %"]),
    "a time": ("`phi1.save` writes the current one", "`phi1.save` takes 12 ms and writes the current one", ["12 ms"]),
    "a time in a comment of code": ("# what a run did, in a few lines", "# what a run did, in 0.3 s", ["0.3 s"]),
    "a range of rates": ("No speed was measured on a GPU yet.", "Decoding makes 40-50 tokens/s.", ["40 tokens/s"]),
}


@pytest.mark.parametrize("change", SAID)
def test_an_unmeasured_number_in_words_is_found(change):
    before, after, found = SAID[change]
    assert before in README
    assert unsupported(README.replace(before, after)) == found


ROWS = {
    "of the training": ("| 4,096 | 7,972", "| 32,000 | 2,796 / 1,383 | 1.97 [1.88-2.07] | 0.53 |\n| 4,096 | 7,972"),
    "of the training, the two exchanged": ("| 2,796 / 1,383 |", "| 1,383 / 2,796 |"),
    "of the faults": ("| SIGKILL of torchrun |", "| a power cut | a save | 1, 1, 1 |\n| SIGKILL of torchrun |"),
    "of the faults, a changed number": ("| a rank that hangs | the watchdog and torchrun's restart | 9,",
                                        "| a rank that hangs | the watchdog and torchrun's restart | 8,"),
    "of the report": ("| save model=nano", "| save model=phi1 | 1 | 1 GB/s | 5 % | - | - |\n| save model=nano"),
    "of a table of its own": ("## Train\n", "| what | times as fast |\n|---|---|\n| loading | 9 |\n\n## Train\n"),
}


@pytest.mark.parametrize("place", ROWS)
def test_an_invented_row_is_found(place):
    before, after = ROWS[place]
    assert before in README
    assert len(wrong_tables(README.replace(before, after, 1))) == 1
