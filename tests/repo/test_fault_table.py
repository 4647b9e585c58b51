"""The fault table of docs/training.md equals the results of the fault campaign."""

import json
from pathlib import Path

from run_faults import FAULTS, markdown_table

ROOT = Path(__file__).parents[2]


def test_docs_show_the_results_of_the_fault_campaign():
    results = json.loads((ROOT / "tests" / "train" / "run" / "faults.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = page.split("<!-- faults: begin -->\n")[1].split("<!-- faults: end -->")[0]
    assert table == markdown_table(results)
    assert {name.rsplit(", ", 1)[0] for name in results} == set(FAULTS)
