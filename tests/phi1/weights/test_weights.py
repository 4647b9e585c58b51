"""Loading weights: the four published layouts, damaged files named, and what a Hub id fetches."""

import json
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY, assert_same, tiny_model

from phi1.weights.files import open_tensors
from phi1.weights.huggingface import load, save, save_state_dict


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save(tiny_model(), folder)
    return folder


def copy_folder(saved, target):
    target.mkdir()
    for path in saved.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


# The older layouts, made from the current one by the inverse of what transformers' conversion script does.

def per_head(q, k, v, heads):
    """Rows of q, k, v -> rows q k v of head 0, then of head 1, ..."""
    parts = [part.unflatten(0, (heads, -1)) for part in (q, k, v)]
    return torch.stack(parts, dim=1).flatten(0, 2).contiguous()


def to_fused(state, heads, interleaved):
    out = {name: tensor for name, tensor in state.items() if "q_proj" not in name and "k_proj" not in name
           and "v_proj" not in name}
    for n in range(TINY.num_hidden_layers):
        for leaf in ("weight", "bias"):
            parts = [state[f"model.layers.{n}.self_attn.{p}_proj.{leaf}"] for p in "qkv"]
            fused = per_head(*parts, heads) if interleaved else torch.cat(parts)
            out[f"model.layers.{n}.self_attn.query_key_value.{leaf}"] = fused
    return out


def rename(state, pairs):
    out = {}
    for name, tensor in state.items():
        for old, new in pairs:
            name = name.replace(old, new)
        out[name] = tensor
    return out


def layout_a(state, fc=("fc1", "fc2")):
    last = TINY.num_hidden_layers + 1
    state = rename(to_fused(state, 4, False), [
        ("model.embed_tokens", "wte"), ("model.final_layernorm", f"layers.{last}.ln"),
        ("lm_head", f"layers.{last}.linear"), ("input_layernorm", "ln"), ("self_attn.query_key_value", "mixer.Wqkv"),
        ("self_attn.dense", "mixer.out_proj"), ("mlp.fc1", f"mlp.{fc[0]}"), ("mlp.fc2", f"mlp.{fc[1]}"),
    ])
    out = {}
    for name, tensor in state.items():
        if name.startswith("wte"):
            name = "layers.0." + name
        elif name.startswith("model.layers."):
            n, rest = name.removeprefix("model.layers.").split(".", 1)
            name = f"layers.{int(n) + 1}.{rest}"
        out[name] = tensor
    for n in range(1, last):
        out[f"layers.{n}.mixer.rotary_emb.inv_freq"] = torch.ones(2)
    return out


def layout_b(state):
    return rename(to_fused(state, 4, False), [
        ("model.embed_tokens", "transformer.embd.wte"), ("model.final_layernorm", "lm_head.ln"),
        ("lm_head.weight", "lm_head.linear.weight"), ("lm_head.bias", "lm_head.linear.bias"),
        ("model.layers", "transformer.h"), ("input_layernorm", "ln"), ("self_attn.query_key_value", "mixer.Wqkv"),
        ("self_attn.dense", "mixer.out_proj"),
    ])


OLD_CONFIG = {"vocab_size": 96, "n_embd": 32, "n_inner": 80, "n_layer": 3, "n_head": 4, "rotary_dim": 4,
              "n_positions": 64, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "embd_pdrop": 0.0}
OLD_ROPE = {"model_type": "phi", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": 4, "partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_scaling": None,
            "max_position_embeddings": 64, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new", "eos_token_id": None}
LAYOUTS = {
    "A": (layout_a, OLD_CONFIG | {"model_type": "mixformer-sequential"}),
    "A, fc_in": (lambda state: layout_a(state, ("fc_in", "fc_out")),
                 OLD_CONFIG | {"model_type": "mixformer-sequential"}),
    "B": (layout_b, OLD_CONFIG | {"model_type": "phi-msft", "n_head_kv": None}),
    "C": (lambda state: to_fused(state, 4, True), OLD_ROPE),
    "D, old rope keys": (dict, OLD_ROPE),
}


@pytest.mark.parametrize("kind", ["safetensors", "bin", "old bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_loads_bit_for_bit(saved, tmp_path, layout, kind):
    convert, config = LAYOUTS[layout]
    state = convert(load_file(saved / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    if kind == "safetensors":
        save_file(state, tmp_path / "model.safetensors")
    else:
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")
    model = load(tmp_path, device="cpu")
    assert not model.training
    assert_same(model, tiny_model())
    assert model.config == TINY


def test_sharded_layouts_load(saved, tmp_path):
    state = layout_b(load_file(saved / "model.safetensors"))
    names = sorted(state)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(LAYOUTS["B"][1]))
    assert_same(load(tmp_path, device="cpu"), tiny_model())

    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model-00002-of-00002\.bin"):
        load(tmp_path, device="cpu")


def test_dtype_is_the_files_or_what_is_asked(tmp_path):
    model = tiny_model()
    save_state_dict(model.state_dict(), TINY, tmp_path / "half", dtype="float16")
    half = load(tmp_path / "half", device="cpu")
    assert half.head.weight.dtype == torch.float16
    assert half.rotary_tables.dtype == torch.float32
    assert torch.equal(half.head.weight, model.head.weight.half())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    assert load(tmp_path / "half", device="cpu", dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16
    assert load(tmp_path / "half", device="cpu", dtype="fp32").norm.weight.dtype == torch.float32
    with pytest.raises(ValueError, match=r"dtype must be one of .*; got int8"):
        load(tmp_path / "half", dtype="int8")


def test_all_misfits_are_in_one_error(saved, tmp_path):
    folder = copy_folder(saved, tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.fc1.bias"], state["lm_head.bias"]
    state["model.layers.9.mlp.fc1.bias"] = torch.ones(80)
    state["extra"] = torch.ones(1)
    state["lm_head.weight"] = torch.ones(95, 32)
    state["model.final_layernorm.bias"] = torch.ones(32, dtype=torch.int32)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"^load: ") as caught:
        load(folder, device="cpu")
    message = str(caught.value)
    assert "missing: model.layers.1.mlp.fc1.bias, lm_head.bias" in message
    for part in ("model.layers.9.mlp.fc1.bias", "extra", "lm_head.weight [95, 32], which must be [96, 32]",
                 "model.final_layernorm.bias (torch.int32)"):
        assert part in message
    assert "\n" not in message


def damage_cases():
    def cut(name, size):
        def damage(folder):
            raw = (folder / name).read_bytes()
            (folder / name).write_bytes(raw[:size])
        return damage

    def pickled(value):
        def damage(folder):
            (folder / "model.safetensors").unlink()
            torch.save(value, folder / "pytorch_model.bin")
        return damage

    def cut_pickle(folder):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        raw = (folder / "pytorch_model.bin").read_bytes()
        (folder / "pytorch_model.bin").write_bytes(raw[: len(raw) // 2])

    def reconfigure(**changes):
        def damage(folder):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | changes))
        return damage

    return {
        "cut tensors": (cut("model.safetensors", -7), ValueError, r"model\.safetensors is damaged, truncated"),
        "cut header": (cut("model.safetensors", 40), ValueError, r"model\.safetensors is damaged, truncated"),
        "empty": (cut("model.safetensors", 0), ValueError, r"model\.safetensors is damaged, truncated"),
        "cut pickle": (cut_pickle, ValueError, r"pytorch_model\.bin is damaged, truncated"),
        "code in a pickle": (pickled({"a": subprocess.Popen}), ValueError, r"pytorch_model\.bin is damaged"),
        "no tensors": (pickled({"a": 1}), ValueError, "must hold a dictionary of tensors"),
        "another model": (pickled({"bert.w": torch.ones(2)}), ValueError, r"no phi-1 in any .*called bert\.w"),
        "cut config": (cut("config.json", 30), ValueError, r"config\.json is damaged"),
        "no config": (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, r"config\.json is missing"),
        "no weights": (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "holds no weights"),
        "llama": (reconfigure(model_type="llama"), ValueError, "model_type must be one of phi, .*got 'llama'"),
        "no width": (reconfigure(hidden_size=None), ValueError, "keys hidden_size are missing"),
        "heads": (reconfigure(num_attention_heads="4"), ValueError, "num_attention_heads must be a whole number"),
        "width": (reconfigure(hidden_size=33), ValueError, "hidden_size must be a multiple"),
        "grouped": (reconfigure(num_key_value_heads=2, hidden_act="silu"), NotImplementedError,
                    "num_key_value_heads 2 .*hidden_act silu"),
        "scaled": (reconfigure(rope_scaling={"type": "linear", "factor": 2}), NotImplementedError, "rope_scaling"),
        "a path in the index": (lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}'),
        ), ValueError, "must name files of its own folder"),
    }


@pytest.mark.parametrize("case", damage_cases())
def test_a_damaged_folder_gives_one_line_with_the_file(saved, tmp_path, case):
    damage, kind, match = damage_cases()[case]
    folder = copy_folder(saved, tmp_path / "model")
    damage(folder)
    with pytest.raises(kind, match=match) as caught:
        load(folder, device="cpu")
    assert str(caught.value).startswith("load: ")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_folder_device_or_hub_model(saved, monkeypatch):
    import huggingface_hub

    with pytest.raises(FileNotFoundError, match="there is no folder /no/such/model"):
        load("/no/such/model")
    with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
        load(saved / "config.json")
    with pytest.raises(ValueError, match="device must be one such as"):
        load(saved, device="gpu")
    with pytest.raises(ValueError, match="device cuda:99 is not there"):
        load(saved, device="cuda:99")

    def offline(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"no folder microsoft/phi-9, and the .* Hub .*main: no route to"):
        load("microsoft/phi-9", revision="main")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_hub_id_fetches_one_kind_of_weights(saved, tmp_path, monkeypatch, kind):
    import fnmatch

    import huggingface_hub

    remote, local, asked = copy_folder(saved, tmp_path / "remote"), tmp_path / "local", []
    (remote / "training_args.bin").write_bytes(b"not wanted")
    torch.save(load_file(remote / "model.safetensors"), remote / "pytorch_model.bin")
    if kind == "bin":
        (remote / "model.safetensors").unlink()

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision))
        local.mkdir(exist_ok=True)
        for path in remote.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                (local / path.name).write_bytes(path.read_bytes())
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(load("someone/phi", device="cpu", revision="abc"), tiny_model())
    assert set(asked) == {("someone/phi", "abc")}
    weights = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    assert {path.name for path in local.iterdir()} == {"config.json", "generation_config.json", weights}


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 30).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="its header: must have at most 8,388,608 bytes; got 1073741824"):
        open_tensors(path)
