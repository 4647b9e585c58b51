"""The tokenizer inside a GGUF file: as llama.cpp reads it, and whole, as the text of a tokenizer.json."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import tokenizers

from phi1.arguments import require, shown

_JSON = "tokenizer.huggingface.json"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def gguf_package(op: str) -> Any:
    """Return the package gguf. Raises ValueError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{op}: GGUF files need the package gguf: pip install gguf") from None
    return gguf


def open_gguf(op: str, path: Path) -> Any:
    """Return a gguf.GGUFReader, which maps the file. Raises ValueError for a damaged file, or one of another format."""
    gguf = gguf_package(op)
    try:
        return gguf.GGUFReader(path)
    except OSError:
        raise
    except Exception as error:  # of NumPy, of its mapping, of Python's unpacking: whatever the damage leads to
        raise ValueError(f"{op}: {path} is damaged, truncated or no GGUF file: {error}") from error


def add_tokenizer(writer: Any, tokenizer: Any, vocab_size: int) -> None:
    """Add a phi1.Tokenizer to a gguf.GGUFWriter. Rows of the model beyond its tokens are unused tokens.

    Raises:
        ValueError: it has rules that llama.cpp does not know, or more tokens than the model has rows.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        text = (Path(folder) / "tokenizer.json").read_text(encoding="utf-8")
    state = json.loads(text)
    _check_rules(state)
    require(len(tokenizer) <= vocab_size, "save_gguf", f"the tokenizer must have at most {vocab_size} tokens, as many "
            "as the model has rows", len(tokenizer))
    names = {i: token for token, i in state["model"]["vocab"].items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    names |= {i: token["content"] for i, token in added.items()}
    kinds = [_UNUSED if i not in names else _NORMAL if i not in added
             else _CONTROL if added[i]["special"] else _USER_DEFINED for i in range(vocab_size)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # GPT-2's pattern, which CodeGen's and phi's tokenizers have too
    writer.add_token_list([names.get(i, f"[unused{i}]") for i in range(vocab_size)])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for name, i in (("bos", tokenizer.eos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id)):
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_string(_JSON, text)


def _check_rules(state: dict[str, Any]) -> None:
    """Raise ValueError unless a tokenizer splits text as llama.cpp's "gpt-2" does."""
    pre, model = state["pre_tokenizer"] or {}, state["model"]
    plain = pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space") and pre.get("use_regex", True)
    require(plain and state["normalizer"] is None, "save_gguf", "the tokenizer must be split by ByteLevel alone, with "
            "GPT-2's pattern and no normalizer", f"{shown(state['normalizer'])} and {shown(pre)}")
    for name, usual in (("ignore_merges", False), ("dropout", None), ("byte_fallback", False),
                        ("continuing_subword_prefix", None), ("end_of_word_suffix", None)):
        require(not model.get(name), "save_gguf", f"the tokenizer's {name} must be {usual}", shown(model.get(name)))
    for token in state["added_tokens"]:
        if flags := [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]:
            raise ValueError(f"save_gguf: added tokens must match anywhere; {token['content']!r} has {flags[0]}")


def read_tokenizer(path: Path) -> tuple[tokenizers.Tokenizer, str, str | None]:
    """Return the backend of the tokenizer in a GGUF file, its end-of-text token, and its padding token.

    Raises:
        ValueError: the file is damaged, or was written by a program that left tokenizer.json out.
    """
    reader = open_gguf("load_tokenizer", path)
    field = reader.get_field(_JSON)
    if field is None:
        raise ValueError(f"the file has no {_JSON}; take the tokenizer from elsewhere, such as microsoft/phi-2")
    backend = tokenizers.Tokenizer.from_str(field.contents())
    eos, pad = (backend.id_to_token(reader.get_field(f"tokenizer.ggml.{name}_token_id").contents())
                for name in ("eos", "padding"))
    if eos is None:
        raise ValueError("its end-of-text token is none of its tokens")
    return backend, eos, None if pad == eos else pad
