"""Saving weights: transformers and `load` read the files, and a save that fails leaves the old model."""

import json
import os
import resource

import pytest
import torch
from crashes import ends_early
from safetensors import safe_open
from tiny_models import TINY, assert_same, tiny_model

import phi1.weights.huggingface
from phi1 import Phi1Config
from phi1.model import Phi1
from phi1.weights.huggingface import load, save, save_state_dict


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 20_000])
def test_load_and_transformers_read_a_saved_model(tmp_path, shard_bytes):
    from transformers import PhiForCausalLM

    model, folder = tiny_model(4), tmp_path / "new" / "model"
    save(model, folder, max_shard_bytes=shard_bytes)
    files = list(folder.glob("*.safetensors"))
    assert len(files) == 1 if shard_bytes > 10**9 else len(files) > 2
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert_same(load(folder, device="cpu"), model)
    theirs, report = PhiForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.eos_token_id is None
    assert theirs.config.rope_parameters["partial_rotary_factor"] == 0.5
    state = theirs.state_dict()
    for layer, block in enumerate(model.blocks):
        d = TINY.hidden_size
        ours = {"self_attn.k_proj.weight": block.in_proj.weight[d : 2 * d],
                "mlp.fc1.bias": block.in_proj.bias[3 * d :],
                "self_attn.dense.weight": block.out_proj.weight[:, :d],
                "mlp.fc2.weight": block.out_proj.weight[:, d:],
                "self_attn.dense.bias": block.out_proj.bias[0], "mlp.fc2.bias": block.out_proj.bias[1]}
        for name, tensor in ours.items():
            assert torch.equal(state[f"model.layers.{layer}.{name}"], tensor), name
    ids = torch.randint(0, TINY.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = theirs.eval()(ids).logits, model(ids)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_transformers_saves_loads(tmp_path):
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    theirs = PhiForCausalLM(PhiConfig(
        vocab_size=96, hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, rope_parameters={"rope_type": "default", "rope_theta": 5000.0,
                                                     "partial_rotary_factor": 0.4}, resid_pdrop=0.1)).eval()
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu")
    assert (model.config.rotary_dim, model.config.rope_theta, model.config.residual_dropout) == (8, 5000.0, 0.1)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected, logits = theirs(ids).logits, model(ids)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_written_config_keeps_every_field(tmp_path):
    # 6 of 22: 22 * (6 / 22) rounds to just under 6 for some such pairs, which int() would make 5.
    for heads, dim, rotary in ((2, 22, 6), (3, 49, 14), (1, 80, 32), (2, 23, 22)):
        config = Phi1Config(vocab_size=8, hidden_size=heads * dim, intermediate_size=4, num_hidden_layers=1,
                            num_attention_heads=heads, rotary_dim=rotary, rope_theta=500.0, layer_norm_eps=1e-6,
                            initializer_range=0.01, attention_dropout=0.1, residual_dropout=0.2,
                            max_position_embeddings=7)
        save(Phi1(config), tmp_path / "model")
        assert load(tmp_path / "model", device="cpu").config == config


def test_the_config_names_the_end_of_text(tmp_path):
    class OneToken:
        eos_id = 5

        def save(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    save(tiny_model(), tmp_path / "a", tokenizer=OneToken())
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "a" / name).read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (5, 5)
    assert (tmp_path / "a" / "tokenizer.json").exists()
    published = Phi1Config(vocab_size=51200, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                           num_attention_heads=1, rotary_dim=4)
    save(Phi1(published), tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eos_token_id"] == 50256


def test_save_replaces_a_saved_model_and_nothing_else(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save(tiny_model(1), folder, max_shard_bytes=20_000)
    save(tiny_model(2), folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "generation_config.json",
                                                              "model.safetensors"]
    assert_same(load(folder, device="cpu"), tiny_model(2))
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex\)"):
        save(tiny_model(3), folder)
    with pytest.raises(ValueError, match="is a file"):
        save(tiny_model(3), folder / "thesis.tex")
    assert_same(load(folder, device="cpu"), tiny_model(2))
    (folder / "thesis.tex").unlink()
    monkeypatch.setattr(phi1.weights.huggingface, "_write_tensors", None)  # refused before anything is written
    with pytest.raises(ValueError, match=r"model holds other files \(config\.json, generation_config"):
        save(tiny_model(3), folder, replace=False)


@pytest.mark.parametrize("replace", [True, False])
def test_a_file_that_is_put_there_meanwhile_stays(tmp_path, monkeypatch, replace):
    """A new folder also refuses a file of another save."""
    folder, write = tmp_path / "model", phi1.weights.huggingface._write_configs
    mine = folder / ("thesis.tex" if replace else "vocab.json")
    if replace:
        save(tiny_model(1), folder)

    def meanwhile(config, at, *rest):
        write(config, at, *rest)
        if at.parent.name.startswith(".model."):
            folder.mkdir(exist_ok=True)
            mine.write_text("years of work")

    monkeypatch.setattr(phi1.weights.huggingface, "_write_configs", meanwhile)
    message = r"holds other files \(thesis\.tex\)" if replace else "must be new or empty, and has got files since"
    with pytest.raises(ValueError, match=rf"^save: {folder} {message}"):
        save(tiny_model(2), folder, replace=replace)
    assert mine.read_text() == "years of work"
    assert os.listdir(tmp_path) == ["model"]
    if replace:
        assert_same(load(folder, device="cpu"), tiny_model(1))


@pytest.mark.parametrize("at", ["a rename aside", "a file"])
def test_killed_it_leaves_nothing_once_another_save_begins(tmp_path, monkeypatch, at):
    folder = tmp_path / "model"
    save(tiny_model(1), folder)

    def rename(source, target, rename=os.rename):
        rename(source, target)
        os._exit(0)

    with monkeypatch.context() as patch:
        if at == "a file":
            patch.setattr(phi1.weights.huggingface, "_write_configs", lambda *args: os._exit(0))
        patch.setattr(os, "rename", rename)
        assert ends_early(lambda: save(tiny_model(2), folder))
    assert len(os.listdir(tmp_path)) == 1 + folder.exists()
    with pytest.raises(ValueError, match="holds other files"):
        save(tiny_model(3), folder, replace=False)
    assert os.listdir(tmp_path) == ["model"]
    assert_same(load(folder, device="cpu"), tiny_model(1))


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save(tiny_model(1), folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the system refuses the write in the middle of the file
    try:
        with pytest.raises(OSError, match=r"^save: .*model\.safetensors could not be written"):
            save(tiny_model(2), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    usage = phi1.weights.huggingface.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(phi1.weights.huggingface.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs 0\.00 GB at .*; 0\.00 GB are free"):
        save(tiny_model(2), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_failing_tokenizer_leaves_nothing(tmp_path):
    class Broken:
        eos_id = 0

        def save(self, folder):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save(tiny_model(), tmp_path / "model", tokenizer=Broken())
    assert list(tmp_path.iterdir()) == []


def test_save_state_dict_lists_every_misfit(tmp_path):
    state = dict(tiny_model().state_dict())
    del state["blocks.0.in_proj.bias"]
    state["optimizer"] = torch.ones(1)
    state["head.bias"] = torch.ones(7)
    with pytest.raises(ValueError, match=r"missing: blocks\.0\.in_proj\.bias; unexpected: opt.*misshapen: head\.b"):
        save_state_dict(state, TINY, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_saved_files_are_readable_by_others(tmp_path):
    mask = os.umask(0o022)
    try:
        save(tiny_model(), tmp_path / "model")
    finally:
        os.umask(mask)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


WRAPPERS = (torch.compile, torch.nn.DataParallel, lambda model: torch.nn.DataParallel(torch.compile(model)))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_is_saved_as_the_model_inside(tmp_path, wrap):
    save(wrap(tiny_model()), tmp_path / "model")
    assert_same(load(tmp_path / "model", device="cpu"), tiny_model())


def test_parameters_that_share_memory_are_saved_apart(tmp_path):
    model = tiny_model()
    model.head.weight = model.embed.weight
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", device="cpu")
    assert torch.equal(loaded.head.weight, loaded.embed.weight)
    assert loaded.head.weight.data_ptr() != loaded.embed.weight.data_ptr()
