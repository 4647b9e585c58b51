"""phi-1's tokenizer against published ids and hashes, against transformers, and on real source files."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import resource
import subprocess
import sys

import pytest

from phi1.tokenizer import BUILT_IN, MERGES_FILE, Tokenizer, load_tokenizer, train_bpe
from phi1.tokenizer_rules import EOS, MIN_VOCAB, RUNS, byte_level_vocab, read_merges

# Ids published for CodeGen's tokenizer: in transformers' tests of it, in its documentation, and in TabbyML's.
hypothesis, st = pytest.importorskip("hypothesis"), pytest.importorskip("hypothesis.strategies")

PUBLISHED = [
    ("Hello world", [15496, 995]),
    (" Hello world", [18435, 995]),
    ("The quick brown fox jumps over the lazy dog.", [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13]),
    ("BERT is designed to pre-train deep bidirectional representations from unlabeled text by jointly conditioning on "
     "both left and right context in all layers.",
     [13246, 51, 318, 3562, 284, 662, 12, 27432, 2769, 8406, 4154, 282, 24612, 422, 9642, 9608, 276, 2420, 416, 26913,
      21143, 319, 1111, 1364, 290, 826, 4732, 287, 477, 11685, 13]),
    ("Transformers (formerly known as pytorch-transformers and pytorch-pretrained-bert) provides general-purpose "
     "architectures (BERT, GPT-2, RoBERTa, XLM, DistilBert, XLNet...) for Natural Language Understanding (NLU) and "
     "Natural Language Generation (NLG) with over 32+ pretrained models in 100+ languages and deep interoperability "
     "between Jax, PyTorch and TensorFlow.",
     [41762, 364, 357, 36234, 1900, 355, 12972, 13165, 354, 12, 35636, 364, 290, 12972, 13165, 354, 12, 5310, 13363, 12,
      4835, 8, 3769, 2276, 12, 29983, 45619, 357, 13246, 51, 11, 402, 11571, 12, 17, 11, 5564, 13246, 38586, 11, 16276,
      44, 11, 4307, 346, 33, 861, 11, 16276, 7934, 23029, 329, 12068, 15417, 28491, 357, 32572, 52, 8, 290, 12068,
      15417, 16588, 357, 32572, 38, 8, 351, 625, 3933, 10, 2181, 13363, 4981, 287, 1802, 10, 8950, 290, 2769, 48817,
      1799, 1022, 449, 897, 11, 9485, 15884, 354, 290, 309, 22854, 37535, 13]),
    ("def fib(n):\n    if n < 1:\n", [4299, 12900, 7, 77, 2599, 198, 50284, 361, 299, 1279, 352, 25, 198]),
    ("\n    return", [198, 50284, 7783]),
    (EOS, [50256]),
]
FINGERPRINT = "6d0d86d552373032f97a7891e55e9f917b7ae14a6d45f73990423c3422ae1da5"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="module")
def hugging_face():
    """transformers' own class, built from GPT-2's two files and CodeGen's added tokens."""
    transformers = pytest.importorskip("transformers")
    merges = read_merges(gzip.decompress(MERGES_FILE.read_bytes()).decode())
    built = transformers.CodeGenTokenizer(vocab=byte_level_vocab(merges), merges=merges)
    built.add_tokens([transformers.AddedToken(run, normalized=True, special=False) for run in RUNS])
    return built


@pytest.mark.parametrize(("text", "ids"), PUBLISHED, ids=range(len(PUBLISHED)))
def test_published_ids(tokenizer, text, ids):
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids, skip_special=False) == text


def test_names_and_sizes(tokenizer):
    assert len(tokenizer) == 50295
    assert tokenizer.eos_id == tokenizer.pad_id == 50256
    for name in BUILT_IN:
        assert load_tokenizer(name).fingerprint == tokenizer.fingerprint == FINGERPRINT


def test_whitespace_runs(tokenizer):
    for n in range(2, 32):
        assert tokenizer.encode(" " * n) == [50288 - n]
    for n in range(2, 10):
        assert tokenizer.encode("\t" * n) == [50296 - n]
    assert tokenizer.encode(" " * 40) == [50257, 50288 - 9]  # the longest first: 31 + 9
    assert tokenizer.encode(" " * 32 + "x") == [50257, *tokenizer.encode(" x")]  # a last single space joins the word
    assert tokenizer.encode("\t" * 10 + "x") == [50287, *tokenizer.encode("\tx")]


def test_source_files_come_back_one_by_one_and_in_a_batch(tokenizer, source_files):
    for text, ids in zip(source_files, tokenizer.encode_batch(source_files), strict=True):
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text


def test_equals_transformers(tokenizer, hugging_face, source_files):
    odd = ["", " ", "\t \t  x   \n\n   ", "é\u0301 \U0001f600\r\n"]
    for text in [*source_files, *(text for text, _ in PUBLISHED), *odd]:
        ids = hugging_face(text)["input_ids"]
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == hugging_face.decode(ids, skip_special_tokens=True,
                                                            clean_up_tokenization_spaces=False)


@hypothesis.given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \t\n<|endoftext>")),
                          max_size=200))
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.decode_bytes(tokenizer.encode(text, special=False)) == text.encode()


@hypothesis.given(st.lists(st.integers(0, 50294), max_size=40))
@hypothesis.settings(max_examples=200, deadline=None)
def test_any_ids_decode_as_transformers_does(tokenizer, hugging_face, ids):
    for skip in (True, False):
        theirs = hugging_face.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip_special=skip) == theirs


def test_end_of_text_is_a_token_or_plain_text(tokenizer):
    text = f"a{EOS}b"
    assert tokenizer.encode(text) == [64, 50256, 65]
    assert tokenizer.decode([64, 50256, 65]) == "ab"
    assert tokenizer.decode([64, 50256, 65], skip_special=False) == text
    literal = tokenizer.encode(text, special=False)
    assert 50256 not in literal
    assert tokenizer.decode(literal) == text
    assert tokenizer.encode_batch([text, "  x"], special=False) == [literal, tokenizer.encode("  x")]
    assert tokenizer.encode(text) == [64, 50256, 65]  # the one does not change the other


def test_a_stream_of_ids_decodes_without_breaking_a_character(tokenizer):
    text = "x = '\U0001f600 é 漢字'  # ok"
    ids = tokenizer.encode(text)
    assert "\ufffd" in "".join(tokenizer.decode([i]) for i in ids)  # some character lies across two tokens
    decoder = codecs.getincrementaldecoder("utf-8")()
    assert "".join(decoder.decode(tokenizer.decode_bytes([i])) for i in ids) == text


@pytest.mark.parametrize("wrong", [50295, 51199, -1])
def test_an_id_outside_the_vocabulary_is_named(tokenizer, wrong):
    with pytest.raises(ValueError, match=rf"decode: ids must be from 0 to 50294; got {wrong}"):
        tokenizer.decode([5, wrong, 6])


def test_loads_fast_and_alone(tmp_path):
    """The time of a fresh process without network or home, imports included."""
    code = ("import socket, sys; socket.socket = None; from phi1.tokenizer import load_tokenizer; "
            "assert load_tokenizer().encode('  x')[0] == 50286; "
            "assert not {'torch', 'triton', 'transformers', 'huggingface_hub'} & set(sys.modules)")
    seconds = []
    env = {**os.environ, "HOME": str(tmp_path)}
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=env)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 1.0  # 0.2 s measured; the interpreter's own start is part of it
    assert list(tmp_path.iterdir()) == []


def test_transformers_and_phi1_read_each_others_files(tokenizer, hugging_face, source_files, tmp_path):
    transformers = pytest.importorskip("transformers")
    trained = train_bpe(source_files, 700)
    for ours, folder in ((tokenizer, tmp_path / "phi1"), (trained, tmp_path / "trained")):
        ours.save(folder)
        for with_model in (False, True):
            if with_model:  # an exported model's folder, where the model type could choose another class
                transformers.PhiConfig(vocab_size=len(ours)).save_pretrained(folder)
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (ours.eos_id, ours.eos_id, len(ours))
            for text in [*source_files, "a . b ,c  don 't", "   \t\t\tx" + " " * 40]:
                ids = theirs(text)["input_ids"]
                assert ids == ours.encode(text)
                assert theirs.decode(ids) == ours.decode(ids) == text
        again = load_tokenizer(folder)
        assert again.fingerprint == ours.fingerprint
        assert (len(again), again.eos_id) == (len(ours), ours.eos_id)
    hugging_face.save_pretrained(tmp_path / "theirs")
    code = "def f():\n        pass"
    assert load_tokenizer(tmp_path / "theirs").encode(code) == tokenizer.encode(code)


def test_reads_the_published_set_of_files(tokenizer, source_files, tmp_path):
    merges = gzip.decompress(MERGES_FILE.read_bytes()).decode()
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    (tmp_path / "vocab.json").write_text(json.dumps(byte_level_vocab(read_merges(merges))), encoding="utf-8")
    added = {run: 50257 + i for i, run in enumerate(RUNS)}
    (tmp_path / "added_tokens.json").write_text(json.dumps(dict(sorted(added.items()))), encoding="utf-8")
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.encode_batch(source_files) == tokenizer.encode_batch(source_files)
    assert loaded.fingerprint == tokenizer.fingerprint
    (tmp_path / "added_tokens.json").write_text(json.dumps({"  ": 50300}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"the id of '  ' in added_tokens.json"):
        load_tokenizer(tmp_path)


def test_a_stored_truncation_or_padding_is_not_applied(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    state["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    assert len(load_tokenizer(tmp_path).encode("a b c d e f")) == 6


@pytest.mark.parametrize("written", [0, 1])
def test_an_interrupted_save_leaves_each_file_old_or_new(written, tmp_path, monkeypatch):
    def replace(source, target, replace=os.replace):
        if len(replaced) == written:
            raise KeyboardInterrupt
        replaced.append(replace(source, target))

    old, new, replaced = train_bpe([], MIN_VOCAB), train_bpe(["def f(): return f"] * 9, MIN_VOCAB + 5), []
    old.save(tmp_path)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        new.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == (new if written else old).fingerprint
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize(("change", "message"), [
    (None, "neither tokenizer.json nor vocab.json with merges.txt"),
    (lambda s: s.pop("model"), "no tokenizer can be read from"),
    (lambda s: s.update(decoder={"type": "Fuse"}), "must be a BPE with a ByteLevel decoder; got BPE with Fuse"),
    (lambda s: s["added_tokens"].clear(), "'<|endoftext|>' is not in the vocabulary of 256"),
    (lambda s: s["model"]["vocab"].update({"一": 256}), "ids must be 0 to|'一' stands for no byte"),
])
def test_an_empty_folder_or_a_damaged_file_is_one_clear_error(change, message, tmp_path):
    if change:
        train_bpe([], MIN_VOCAB).save(tmp_path)
        state = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
        change(state)
        (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("name", "message"), [
    ("no/such/folder", "must be a folder or a Hub id"),
    ("phi-1", "the Hub did not give it"),
    ("", "name_or_folder must name a file or folder; got an empty path"),
    ("nobody/nothing", "the Hub did not give it"),
])
def test_an_unknown_name_is_one_clear_error(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(name)
    assert "\n" not in str(error.value)


def test_another_hub_id_is_fetched(tokenizer, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    tokenizer.save(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download",
                        lambda name, **options: asked.append((name, options["revision"])) or str(tmp_path))
    assert load_tokenizer("owner/name", revision="v2").fingerprint == tokenizer.fingerprint
    assert asked == [("owner/name", "v2")]
