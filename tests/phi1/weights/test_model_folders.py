"""Model folders of other tools: settings that change the model, ids that end a text, names of wrappers."""

import json
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from phi1.weights.huggingface import load, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    save(tiny_model(), folder := tmp_path_factory.mktemp("saved") / "model")
    return folder


def copied(source, target):
    return shutil.copytree(source, target)


def edited(saved, target, **keys):
    """A copy of a saved model, with keys of config.json set, or left out where the value is ..."""
    folder = copied(saved, target)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


@pytest.mark.parametrize(("keys", "error", "message"), [
    ({"rope_scaling": ..., "rope_parameters": {"type": "linear"}}, NotImplementedError, "'type': 'linear'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, NotImplementedError, "rope_scaling .*linear"),
    ({"rope_parameters": {"rope_type": "default", "type": "yarn"}}, NotImplementedError, "yarn"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, NotImplementedError, "full_attention"),
    ({"rope_scaling": "linear"}, ValueError, "config.json: rope_scaling must be an object .*; got 'linear'"),
    ({"rope_parameters": [1]}, ValueError, r"config.json: rope_parameters must be an object .*; got \[1\]"),
    ({"layer_norm_eps": float("inf")}, ValueError, "layer_norm_eps must be finite; got inf"),
])
def test_settings_that_phi1_would_ignore_are_refused(saved, tmp_path, keys, error, message):
    with pytest.raises(error, match=f"^load: .*{message}"):
        load(edited(saved, tmp_path / "m", **keys), device="cpu")


@pytest.mark.parametrize(("given", "ids"), [([90, 7], (90, 7)), (7, (7,)), (None, ())])
def test_the_end_ids_of_generation_config_are_read_and_saved(saved, tmp_path, given, ids):
    folder = copied(saved, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    model = load(folder, device="cpu")
    assert model.end_ids == ids
    save(model, tmp_path / "again")
    assert load(tmp_path / "again", device="cpu").end_ids == ids
    (folder / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(ValueError, match="eos_token_id must be an id or a list of ids"):
        load(folder, device="cpu")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_names_of_a_wrapper_are_explained(saved, tmp_path, prefix):
    folder = copied(saved, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"every tensor in .* is called {prefix}\.\.\., by the wrapper of"):
        load(folder, device="cpu")


def test_a_tie_between_layouts_names_the_current_one(saved, tmp_path):
    folder = copied(saved, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if not re.search("[qkv]_proj", name)},
              folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.self_attn\.q_proj\.weight"):
        load(folder, device="cpu")


def test_a_folder_has_no_revision(saved):
    with pytest.raises(ValueError, match="load: revision goes with a Hub id; got 'main'"):
        load(saved, revision="main")
