"""Tokenizer folders of other tools, and names that could be a folder or a Hub id."""

import json

import pytest

from phi1.tokenizer import load_tokenizer, train_bpe
from phi1.tokenizer_rules import RUNS


def declared(folder, tokens, **more):
    """Write tokenizer_config.json with tokens that stand nowhere else."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": tokens} | more))


def test_added_tokens_of_the_configuration_alone_count(tmp_path):
    ours = load_tokenizer()
    state = json.loads(ours._backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(state["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in state["merges"]))
    tokens = {str(50257 + i): {"content": run, "normalized": True, "special": False} for i, run in enumerate(RUNS)}
    declared(tmp_path, tokens)
    read = load_tokenizer(tmp_path)
    assert len(read) == len(ours)
    assert read.encode("def f():\n        return 1") == ours.encode("def f():\n        return 1")
    declared(tmp_path, {"50300": {"content": "<x>"}})
    with pytest.raises(ValueError, match="the id of '<x>' must follow those before it; got '50300'"):
        load_tokenizer(tmp_path)


def test_special_tokens_are_left_out_whichever_ends_the_text(tmp_path):
    load_tokenizer().save(tmp_path)
    declared(tmp_path, {str(i): {"content": token, "special": True} for i, token in
                        ((50295, "<|im_start|>"), (50296, "<|im_end|>"))}, eos_token="<|im_end|>")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([1, 50295, 50296, 50256]) == '"'
    assert tokenizer.decode([1, 50295, 50296, 50256], skip_special=False) == '"<|im_start|><|im_end|><|endoftext|>'


def test_a_folder_named_like_a_hub_id_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_bpe(["x = 1\n"] * 3, 300).save("microsoft/phi-2")
    assert len(load_tokenizer("microsoft/phi-2")) < 301
    with pytest.raises(ValueError, match="load_tokenizer: revision goes with a Hub id"):
        load_tokenizer("microsoft/phi-2", revision="main")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="the Hub did not give it"):
        load_tokenizer("microsoft/phi-1", revision="nonsense")


@pytest.mark.parametrize("encode", [lambda t, x: t.encode(x), lambda t, x: t.encode_batch(["a", x])])
def test_half_a_surrogate_pair_is_refused(encode):
    with pytest.raises(ValueError, match=r"^Tokenizer\.encode: texts\[.\] must be valid Unicode text; got '\\ud800'"):
        encode(load_tokenizer(), "a\ud800b")
