"""GGUF files: read with the package gguf, with `phi1.load`, and by llama.cpp where it is installed."""

import importlib.util
import json
import random
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import pre_tokenizers

from phi1 import load, load_tokenizer
from phi1.cli.main import main
from phi1.config import Phi1Config
from phi1.generation import generate
from phi1.model import Phi1
from phi1.tokenizer import Tokenizer, train_bpe
from phi1.weights.gguf_file import save_gguf
from phi1.weights.huggingface import save

CONFIG = Phi1Config(vocab_size=420, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=2,
                    rotary_dim=12, max_position_embeddings=256, rope_theta=5000.0, layer_norm_eps=1e-6)
TEXT = Path(json.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe([TEXT], 400)


@pytest.fixture(scope="module")
def model():
    """Numbers that float16 holds."""
    torch.manual_seed(0)
    found = Phi1(CONFIG)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(0, 0.15)
    return found.half().eval()


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    """The model in Hugging Face's layout, and as f16.gguf and q8_0.gguf."""
    place = tmp_path_factory.mktemp("gguf")
    save(model, place / "model", tokenizer=tokenizer)
    for kind in ("f16", "q8_0"):
        assert main(["convert", "--model", str(place / "model"), "--out", str(place / f"{kind}.gguf"),
                     "--gguf", kind]) == 0
    return place


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_the_package_gguf_reads_tensors_and_tokens(folder, model, tokenizer, kind):
    reader = gguf.GGUFReader(folder / f"{kind}.gguf")
    block, d = model.blocks[1], CONFIG.hidden_size
    expected = {"token_embd.weight": model.embed.weight, "output.weight": model.head.weight,
                "output.bias": model.head.bias, "output_norm.bias": model.norm.bias,
                "blk.1.attn_norm.weight": block.norm.weight, "blk.1.attn_qkv.weight": block.in_proj.weight[: 3 * d],
                "blk.1.attn_qkv.bias": block.in_proj.bias[: 3 * d],
                "blk.1.ffn_up.weight": block.in_proj.weight[3 * d :],
                "blk.1.attn_output.weight": block.out_proj.weight[:, :d],
                "blk.1.ffn_down.weight": block.out_proj.weight[:, d:], "blk.1.ffn_down.bias": block.out_proj.bias[1]}
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == 5 + 2 * 10
    for name, tensor in expected.items():
        numbers = gguf.quants.dequantize(found[name].data, found[name].tensor_type)
        exact = tensor.detach().float().numpy()
        # A number of Q8_0 lies within half a step of 1/127 of the largest in its block of 32.
        step = 0 if kind == "f16" or exact.ndim == 1 else np.abs(exact).max() / 127
        assert np.abs(numbers.reshape(exact.shape) - exact).max() <= 0.51 * step, name
        assert found[name].tensor_type.name == ("F32" if exact.ndim == 1 else kind.upper())
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    assert [tokens[i] for i in tokenizer.encode("    x")] == ["    ", "x"]
    assert kinds[tokenizer.eos_id] == gguf.TokenType.CONTROL
    assert kinds[tokenizer.encode("    ")[0]] == gguf.TokenType.USER_DEFINED
    assert set(kinds[len(tokenizer) :]) == {gguf.TokenType.UNUSED}


@pytest.mark.parametrize("split", [False, True])
def test_it_is_read_back_bit_for_bit(folder, model, tokenizer, tmp_path, split):
    """Other writers keep q, k and v apart."""
    path = folder / "f16.gguf"
    if split:
        path = tmp_path / "split.gguf"
        reader, writer = gguf.GGUFReader(folder / "f16.gguf"), gguf.GGUFWriter(path, "phi2")
        for name, field in reader.fields.items():
            if name.startswith("phi2."):
                writer.add_key_value(name, field.contents(), field.types[0])
        for tensor in reader.tensors:
            parts = np.split(np.array(tensor.data), 3) if "qkv" in tensor.name else [np.array(tensor.data)]
            for letter, part in zip("qkv", parts, strict=False):
                writer.add_tensor(tensor.name.replace("qkv", letter), part)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    back = load(path, device="cpu")
    assert back.config == CONFIG
    assert {name: (p.dtype, p.tolist()) for name, p in back.named_parameters()} == \
        {name: (p.dtype, p.tolist()) for name, p in model.named_parameters()}
    assert back.end_ids == (() if split else (tokenizer.eos_id,))
    if split:
        with pytest.raises(ValueError, match="take the tokenizer from elsewhere"):
            load_tokenizer(path)
    else:
        assert load_tokenizer(path).fingerprint == tokenizer.fingerprint


def test_convert_writes_a_folder_again_and_generate_takes_the_file(folder, model, tmp_path, capsys):
    assert main(["convert", "--model", str(folder / "f16.gguf"), "--out", str(tmp_path / "back")]) == 0
    files = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    assert [name for name in files
            if (tmp_path / "back" / name).read_bytes() != (folder / "model" / name).read_bytes()] == []
    capsys.readouterr()
    assert main(["generate", "--model", str(folder / "q8_0.gguf"), "--prompt", "def", "--max-new-tokens", "3"]) == 0
    (text,) = generate(load(folder / "q8_0.gguf"), load_tokenizer(folder / "model"), "def", max_new_tokens=3)
    assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_llama_cpp_gives_the_same_tokens_and_logits(folder, model, tokenizer):
    import llama_cpp

    theirs = llama_cpp.Llama(str(folder / "f16.gguf"), n_ctx=256, logits_all=True, verbose=False, n_threads=1)
    chance = random.Random(0)
    pieces = [" ", "  ", "\t", "\n", "a", "é", "'ll", "12", " x", "()", "<|endoftext|>", "\u3000", "🙂", "\r\n",
              " " * 33, "\t" * 20]
    texts = ["".join(chance.choices(pieces, k=60)) for _ in range(100)]
    texts += [TEXT[i : i + 200] for i in range(0, 4000, 200)]
    for text in texts:
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text), text
    exact = model.float()
    try:
        for text in texts[-20:]:
            ids = tokenizer.encode(text)[:60]
            theirs.reset()
            for _ in range(12):  # greedily; each side sees its own tokens
                theirs.eval(ids[theirs.n_tokens :])
                with torch.no_grad():
                    logits = exact(torch.tensor([ids]))[0].numpy()
                assert np.abs(np.array(theirs.scores[: len(ids)]) - logits).max() < 1e-2
                assert theirs.scores[len(ids) - 1].argmax() == logits[-1].argmax()
                ids.append(int(logits[-1].argmax()))
    finally:
        model.half()
        theirs.close()


def damaged(folder, place, what):
    """A file that cannot be read."""
    content = (folder / "f16.gguf").read_bytes()
    path = place / "broken.gguf"
    if what == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif what == "text":
        path.write_text("no GGUF\n" * 10)
    elif what == "llama":
        path.write_bytes(content.replace(b"phi2", b"lama", 1))
    elif what == "no eps":
        path.write_bytes(content.replace(b"layer_norm_epsilon", b"layer_norm_epsilom", 1))
    else:
        reader, writer = gguf.GGUFReader(folder / "f16.gguf"), gguf.GGUFWriter(path, "phi2")
        for name, field in reader.fields.items():
            if name.startswith("phi2."):
                writer.add_key_value(name, field.contents(), field.types[0])
        for tensor in reader.tensors:
            data = np.array(tensor.data)
            kind = gguf.GGMLQuantizationType.Q4_0 if data.ndim == 2 and what == "q4_0" else tensor.tensor_type
            if what != "missing" or tensor.name != "output.bias":
                writer.add_tensor(tensor.name, gguf.quants.quantize(data.astype(np.float32), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


@pytest.mark.parametrize(("what", "message"), [
    ("truncated", "is damaged, truncated or no GGUF file"), ("text", "is damaged, truncated or no GGUF file"),
    ("llama", "architecture: must be phi2; got 'lama'"),
    ("no eps", "the key phi2.attention.layer_norm_epsilon is missing"),
    ("q4_0", "of the types Q4_0, where F32, F16 and Q8_0 can be read"), ("missing", "missing: output.bias"),
])
def test_a_file_that_cannot_be_read_is_one_line(folder, tmp_path, capsys, what, message):
    path = damaged(folder, tmp_path, what)
    assert main(["convert", "--model", str(path), "--out", str(tmp_path / "out"), "--tokenizer",
                 str(folder / "model")]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(("options", "message"), [
    (["--out", "a.gguf"], "give --gguf f16 or --gguf q8_0"), (["--out", "folder", "--gguf", "f16"], "a new FILE.gguf"),
    (["--out", "f16.gguf", "--gguf", "f16"], "a new FILE.gguf"),
    (["--out", "a.gguf", "--gguf", "q4_0"], "invalid choice"),
    (["--out", "a.gguf", "--gguf", "f16", "--dtype", "float32"], "--gguf f16 sets the type already"),
    (["--out", "a.gguf", "--gguf", "f16", "--tokenizer", "microsoft/phi-1"], "must have at most 420 tokens"),
])
def test_wrong_options_are_one_line(folder, monkeypatch, capsys, options, message):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    try:
        code = main(["convert", "--model", "model", *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert message in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("change", ["split", "strip", "width", "infinite"])
def test_a_model_that_does_not_fit_the_format_is_refused(model, tokenizer, tmp_path, change):
    state, config, kind = dict(model.state_dict()), CONFIG, "f16"
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    if change == "split":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), backend.pre_tokenizer])
        message = "the tokenizer must be split by ByteLevel alone"
    elif change == "strip":
        backend.add_tokens([tokenizers.AddedToken("<x>", lstrip=True)])
        message = "'<x>' has lstrip"
    elif change == "width":
        kind, config = "q8_0", replace(CONFIG, hidden_size=48, rotary_dim=12)
        message = r"q8_0 needs rows of a multiple of 32 numbers; give f16: token_embd\.weight; got \[420, 48\]"
    else:
        state["embed.weight"] = state["embed.weight"].float() * 1e6
        message = r"token_embd\.weight must be finite and fit in 16 bits; its largest number is \d"
    with pytest.raises(ValueError, match=f"^save_gguf: .*{message}"):
        save_gguf(state, config, tmp_path / "a.gguf", tokenizer=Tokenizer(backend), kind=kind)
    assert list(tmp_path.iterdir()) == []
