"""The rules of phi-1's tokenizer, and the files of one: bytes, merges, the end of a document, runs of whitespace."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from phi1.arguments import check_text, require, shown
from phi1.gguf_tokenizer import read_tokenizer
from phi1.user_files import LARGEST_JSON, read_file, read_json

EOS = "<|endoftext|>"
RUNS = tuple(" " * n for n in range(31, 1, -1)) + tuple("\t" * n for n in range(9, 1, -1))
"""The whitespace runs that are tokens, in the order of their ids."""
MIN_VOCAB = 256 + 1 + len(RUNS)
_NORMAL_FORMS = (type(None), normalizers.NFC, normalizers.NFD, normalizers.NFKC, normalizers.NFKD)

# The greedy pattern matches exactly what a leftmost-longest search for the tokens of RUNS matches.
RUN_PATTERN = re.compile(r" {2,31}|\t{2,9}")


def byte_chars() -> list[str]:
    """Return GPT-2's character for each byte: the byte itself if printable, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def byte_level_vocab(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Return GPT-2's vocabulary for the merges: the 256 bytes, one token a merge, `<|endoftext|>`."""
    tokens = sorted(byte_chars()) + [left + right for left, right in merges] + [EOS]
    return {token: i for i, token in enumerate(tokens)}


def read_merges(text: str) -> list[tuple[str, str]]:
    """Return the pairs of a merges.txt (GPT-2's vocab.bpe), in order."""
    pairs = [tuple(line.split(" ")) for line in text.split("\n") if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("merges.txt must have two tokens a line")
    return pairs  # type: ignore[return-value]


def with_rules(backend: tokenizers.Tokenizer, added: Iterable[str]) -> tokenizers.Tokenizer:
    """Add byte-level splitting and decoding, `<|endoftext|>` and the tokens of `added`."""
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken(EOS, normalized=False)])
    backend.add_tokens([AddedToken(token, normalized=True) for token in added])
    return backend


def _add_declared(backend: tokenizers.Tokenizer, declared: dict[str, dict[str, Any]]) -> None:
    """Add the tokens of tokenizer_config.json's added_tokens_decoder that the backend lacks, in the order of ids."""
    for i, token in sorted(declared.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(token["content"]) is None:
            flags = ("single_word", "lstrip", "rstrip", "normalized")
            options = {flag: bool(token[flag]) for flag in flags if flag in token}
            added = AddedToken(token["content"], special=bool(token.get("special")), **options)
            (backend.add_special_tokens if added.special else backend.add_tokens)([added])
            require(backend.token_to_id(token["content"]) == int(i), "added_tokens_decoder",
                    f"the id of {shown(token['content'])} must follow those before it", shown(i))


def read_backend(folder: Path) -> tuple[tokenizers.Tokenizer, str, str | None]:
    """Return the backend of a tokenizer's folder or GGUF file, its end-of-text token, and its padding token, if any.

    Raises:
        Exception: the files are missing or damaged. `tokenizers` raises no class of its own.
    """
    if folder.is_file():
        return read_tokenizer(folder)
    if (folder / "tokenizer.json").is_file():
        backend = tokenizers.Tokenizer.from_str(_read_text(folder / "tokenizer.json"))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _from_vocab_files(folder)
    else:
        raise ValueError("it has neither tokenizer.json nor vocab.json with merges.txt")
    config = _read_json(folder / "tokenizer_config.json")
    _add_declared(backend, config.get("added_tokens_decoder") or {})
    return backend, _content(config.get("eos_token")) or EOS, _content(config.get("pad_token"))


def _from_vocab_files(folder: Path) -> tokenizers.Tokenizer:
    vocab = _read_json(folder / "vocab.json")
    merges = read_merges(_read_text(folder / "merges.txt"))
    added = sorted(_read_json(folder / "added_tokens.json").items(), key=lambda item: int(item[1]))
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend = with_rules(backend, [token for token, _ in added if token != EOS])
    moved = [token for token, i in added if backend.token_to_id(token) != i]
    if moved:
        raise ValueError(f"the id of {moved[0]!r} in added_tokens.json does not follow those before it")
    return backend


def _read_text(path: Path) -> str:
    return read_file(path, LARGEST_JSON).decode("utf-8-sig")


def _read_json(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} must hold a JSON object; got {shown(value)}")
    return value


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def whole_ids(ids: Iterable[int]) -> list[int]:
    """Return token ids as ints. Raises TypeError unless they are whole numbers."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise TypeError(f"decode: ids must be a list of whole numbers; got {shown(ids)}")
    ids = list(ids)
    try:
        if bool not in map(type, ids):
            return [operator.index(i) for i in ids]
    except TypeError:
        pass
    wrong = next(i for i in ids if isinstance(i, bool) or not hasattr(i, "__index__"))
    raise TypeError(f"decode: ids must be whole numbers; got {shown(wrong)}")


def texts_of(op: str, texts: Iterable[str]) -> Iterator[str]:
    """Yield texts. Raises TypeError or ValueError at one that is none, or that holds half of a surrogate pair."""
    for i, text in enumerate(texts):
        check_text(op, **{f"texts[{i}]": text})
        yield text


def check_backend(backend: tokenizers.Tokenizer) -> None:
    """Raise ValueError unless a backend is a byte-level BPE that tokenises a text as it is."""
    if not isinstance(backend.model, models.BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
        raise ValueError("Tokenizer: backend must be a BPE with a ByteLevel decoder; got "
                         f"{type(backend.model).__name__} with {type(backend.decoder).__name__}")
    if not isinstance(backend.normalizer, _NORMAL_FORMS):
        raise ValueError("Tokenizer: backend must not rewrite texts, but for Unicode's normal forms; got "
                         f"{type(backend.normalizer).__name__}")


def readable(error: BaseException) -> ValueError | None:
    """Return an error for a panic of the Rust code, as for a pattern that never ends; None for another error."""
    panic = type(error).__name__ == "PanicException"
    return ValueError(f"Tokenizer.encode: the tokenizer's own rules fail on this text: {error}") if panic else None


def check_tokenizer(op: str, tokenizer: object, *needs: str) -> None:
    """Raise TypeError unless tokenizer has what a function needs of a Tokenizer."""
    if not all(hasattr(tokenizer, name) for name in needs):
        raise TypeError(f"{op}: tokenizer must be one of phi1.load_tokenizer; got {shown(tokenizer)}")
