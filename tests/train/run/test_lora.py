"""Finetuning with adapters: the model stays as it is, a resumed run has the same bits, and peft loads the adapters."""

import json

import pytest
import torch
from training_runs import evaluations, refusal, train, weights

from phi1 import load
from phi1.cli.main import main
from phi1.train.checkpoint.convert import read_stored
from phi1.train.recipe.recipe import Model, Recipe
from phi1.train.run.preflight import check_recipe
from phi1.train.runtime.launch import Rank

OPTIONS = {"model__init": "whole/export", "model__lora_rank": 4, "train__lr": 1e-2, "train__schedule_steps": 40,
           "train__dropout": 0.0}


@pytest.fixture(scope="module")
def run(place, uninterrupted):
    """40 steps from whole/export; its folder is lora/."""
    return train(place, "lora", train__steps=40, **OPTIONS)


def test_the_loss_falls_and_the_model_stays_as_it_is(place, run):
    assert evaluations(place, "lora")[-1]["loss"] < evaluations(place, "whole")[-1]["loss"] - 0.05
    stored = read_stored(place / "lora" / "checkpoints" / "step-40")
    found, config = stored.weights, stored.config
    assert stored.lora == (4, 16.0)
    before = load(place / "whole" / "export").state_dict()
    assert [name for name, tensor in before.items() if not torch.equal(found[name], tensor)] == []
    assert all(found[f"blocks.{layer}.lora.{name}_b"].abs().max() > 0
               for layer in range(config.num_hidden_layers) for name in ("q", "k", "v", "fc1", "dense", "fc2"))
    after = load(place / "lora" / "export").state_dict()
    changed = {name.split(".", 2)[-1] for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {"in_proj.weight", "out_proj.weight"}
    assert "| trained weights | adapters of rank 4," in (place / "lora" / "export" / "README.md").read_text()
    merged = stored.merged()
    assert all(torch.equal(merged[name], tensor) for name, tensor in after.items())


def test_adapters_need_a_model_to_adapt():
    line = refusal(check_recipe, Recipe(model=Model(lora_rank=4)), Rank())
    assert line == "model.lora_rank needs model.init, a model whose weights stay as they are"


def test_a_resumed_run_has_the_same_bits(place, run):
    train(place, "lora-resumed", train__steps=20, **OPTIONS)
    train(place, "lora-resumed", train__steps=40, **OPTIONS)
    assert weights(place, "lora-resumed") == weights(place, "lora")


@pytest.mark.slow
def test_two_processes_train_the_same_adapters(place, run):
    train(place, "lora-pair", 2, train__steps=40, **OPTIONS)
    one, two = (load(place / name / "export").state_dict() for name in ("lora", "lora-pair"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


def test_peft_loads_the_adapters_and_merges_them_to_the_export(place, run, tmp_path, capsys):
    from peft import PeftModel
    from transformers import PhiForCausalLM

    checkpoint = str(place / "lora" / "checkpoints" / "step-40")
    assert main(["convert", "--model", checkpoint, "--out", str(tmp_path / "adapter"), "--adapter"]) == 0
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "whole/export"
    model = PeftModel.from_pretrained(PhiForCausalLM.from_pretrained(place / "whole" / "export"), tmp_path / "adapter")
    ids = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        applied = model(ids).logits
        exported = load(place / "lora" / "export", device="cpu")(ids)
    torch.testing.assert_close(applied, exported, rtol=1e-4, atol=1e-4)
    plain = str(place / "whole" / "checkpoints" / "step-60")
    assert main(["convert", "--model", plain, "--out", str(tmp_path / "none"), "--adapter"]) == 2
    assert "has no adapters: its run had no model.lora_rank" in capsys.readouterr().err
    assert main(["convert", "--model", str(place / "whole" / "export"), "--out", str(tmp_path / "none"),
                 "--adapter"]) == 2
    assert "--adapter needs a run's checkpoint" in capsys.readouterr().err
