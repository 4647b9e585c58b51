"""The model card of an export: its facts, its header, and its code, which is run."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from training_runs import write_files

from phi1.config import Phi1Config
from phi1.model import Phi1
from phi1.tokenizer import train_bpe
from phi1.train.data.shards import manifest_text, read_manifest
from phi1.train.metrics.card import model_card
from phi1.train.recipe.recipe import Recipe
from phi1.weights import checksums
from phi1.weights.huggingface import save_state_dict

CONFIG = Phi1Config(vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                    rotary_dim=4, max_position_embeddings=64)
CONTENT = {"tokenizer": "70ce", "vocab_size": 320, "eos_id": 0, "files": {},
           "splits": {"train": {"documents": 40, "bytes": 9000, "tokens": 3000, "shards": []},
                      "val": {"documents": 4, "bytes": 900, "tokens": 300, "shards": []}}}


@pytest.fixture
def run(tmp_path):
    """A run's folder and its corpus: two starts, an evaluation at steps 20 and 40, and HumanEval at step 40."""
    write_files(tmp_path, {"hidden/corpus/manifest.json":
                           manifest_text(CONTENT, {"sources": ["/home/hidden/code"], "skipped": {"duplicates": 3}})})
    recipe = Recipe().as_dict()
    recipe["data"] |= {"folder": str(tmp_path / "hidden" / "corpus"), "source": "/home/hidden/code"}
    recipe["model"]["init"] = "microsoft/phi-1"
    del recipe["train"]["weight_decay"]  # a key newer than the run
    start = {"finished": 0, "config": recipe, "data": read_manifest(tmp_path / "hidden" / "corpus")["fingerprint"],
             "versions": {"python": "3.11.7", "phi1": "0.1.0"}, "commit": "abc",
             "environment": {"world_size": 2, "device": "cpu", "precision": "fp32"}}
    lines = [{"start": start}, {"eval": {"step": 20, "loss": 3.5, "bits_per_byte": 1.75, "n_bytes": 900}},
             {"start": start | {"finished": 20, "commit": "def"}},
             {"eval": {"step": 40, "loss": 2.25, "bits_per_byte": 1.125, "n_bytes": 900}},
             {"humaneval": {"step": 40, "pass@1": 0.25, "problems": 164}}]
    write_files(tmp_path / "run", {"ledger.jsonl": "".join(json.dumps(line) + "\n" for line in lines)})
    return tmp_path / "run"


def facts(text):
    return dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", text, re.MULTILINE))


def test_it_holds_the_facts_of_its_step_and_no_folder_of_this_machine(run, tmp_path):
    text = model_card(run, CONFIG, 40)
    found = facts(text)
    assert found["validation loss"] == "2.2500 nats a token, 1.1250 bits a byte, on 900 held-out bytes"
    assert found["HumanEval"] == "pass@1 25.0 % of 164 problems, greedy"
    assert found["training tokens"] == f"{40 * 4 * 256:,}"
    assert found["started from"] == "`microsoft/phi-1`"
    assert found["corpus"] == "`code`"
    assert found["train split"] == "40 documents, 9,000 bytes, 3,000 tokens"
    assert found["left out"] == "3 duplicates"
    assert re.fullmatch("`[0-9a-f]{64}`", found["corpus, SHA-256"])
    assert found["made with"].endswith("commit def")
    assert "weight decay 0.1" in found["optimizer"]
    assert str(tmp_path) not in text
    assert "hidden" not in text
    earlier = facts(model_card(run, CONFIG, 20))
    assert earlier["validation loss"].startswith("3.5000")
    assert earlier["HumanEval"] == "not run"


def test_the_hub_reads_its_header(run):
    data = ModelCard(model_card(run, CONFIG, 40)).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.base_model == "microsoft/phi-1"
    assert data.license is None
    assert data.tags == ["phi", "phi1", "code", "python"]


@pytest.mark.parametrize("ledger", [None, "garbage\n", "[]\n", '{"eval": 3}\n', '{"start": {}}\n'])
def test_without_a_ledger_there_are_no_facts_of_the_run(tmp_path, ledger):
    if ledger:
        (tmp_path / "ledger.jsonl").write_text(ledger)
    text = model_card(tmp_path, CONFIG, 7)
    assert facts(text) | {"fact": "value"} == {"fact": "value", "steps": "7", "validation loss": "not measured",
                                               "HumanEval": "not run"}
    assert ModelCard(text).data.base_model is None


def test_its_code_runs_beside_it_and_its_hashes_hold(run, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model, tokenizer = Phi1(CONFIG), train_bpe(["def area(self):\n    return 1\n"], 300)
    export = tmp_path / "export"
    for _ in range(2):  # the second replaces the first, card and all
        save_state_dict(model.state_dict(), CONFIG, export, tokenizer=tokenizer, card=model_card(run, CONFIG, 40))
    assert checksums.find_damage(export) is None
    assert checksums.read(export).keys() == {path.name for path in export.iterdir()} - {"SHA256SUMS"}
    monkeypatch.chdir(export)
    blocks = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
        assert capsys.readouterr().out.startswith("def area(self):")

    (export / "README.md").write_text("my own words")
    assert checksums.find_damage(export) is None
    with pytest.raises(ValueError, match=r"export holds other files \(README\.md\)"):
        save_state_dict(model.state_dict(), CONFIG, export, tokenizer=tokenizer, card="another")
    (export / "config.json").write_text("{}")
    assert checksums.find_damage(export) == "config.json is not as it was written (SHA-256 differs)"
    (export / "SHA256SUMS").write_text("no hash\n")
    assert checksums.find_damage(export).startswith("SHA256SUMS is damaged: each line")
