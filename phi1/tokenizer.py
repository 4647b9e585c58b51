"""phi-1's tokenizer, built in so that no network is needed, and small byte-level BPEs with the same rules.

phi-1 uses CodeGen's tokenizer (arXiv 2306.11644, section 2.3): GPT-2's byte-level BPE of 50,257 tokens, then a token
for each run of 31 down to 2 spaces (ids 50257 to 50286) and of 9 down to 2 tabs (ids 50287 to 50294). These runs are
split off the raw text first, leftmost and longest, so indentation costs one token. A single space joins the next word.

GPT-2's merges ship compressed as `assets/gpt2-merges.gz` (`build_tokenizer_asset.py` beside it rebuilds it). The
vocabulary follows from them: the 256 bytes, one token a merge, and `<|endoftext|>`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from phi1.arguments import check_flag, check_instance, check_text, check_whole, require, shown, user_path
from phi1.atomic import write_file
from phi1.tokenizer_rules import (
    EOS,
    MIN_VOCAB,
    RUN_PATTERN,
    RUNS,
    byte_chars,
    byte_level_vocab,
    check_backend,
    read_backend,
    read_merges,
    readable,
    texts_of,
    whole_ids,
    with_rules,
)

BUILT_IN = ("microsoft/phi-1", "microsoft/phi-1_5", "microsoft/phi-2")
"""Hub ids whose tokenizer is the built-in one."""
MERGES_FILE = Path(__file__).with_name("assets") / "gpt2-merges.gz"
HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""Ids of the Hugging Face Hub; those of its first models have no owner."""


class Tokenizer:
    """A byte-level BPE: any text has ids, and the ids give back the exact bytes of the text.

    Args:
        backend: the `tokenizers` object underneath, a BPE model with a byte-level decoder.
        eos: the token that ends a document.
        pad: the padding token; None pads with `eos`.

    Raises:
        TypeError: an argument has another type.
        ValueError: `backend` is not a byte-level BPE, or lacks one of these tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eos: str = EOS, pad: str | None = None) -> None:
        check_instance("Tokenizer", "backend", backend, tokenizers.Tokenizer, "a tokenizers.Tokenizer")
        check_text("Tokenizer", eos=eos, pad=eos if pad is None else pad)
        check_backend(backend)
        # A stored tokenizer may hold the settings of its last use; encode must return every id of a text.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_token = eos
        self.pad_token = pad
        self.eos_id = self._id_of(eos)
        self.pad_id = self.eos_id if pad is None else self._id_of(pad)
        special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._special_ids = frozenset(special | {self.eos_id, self.pad_id})

    def _id_of(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise ValueError(f"Tokenizer: the token {token!r} is not in the vocabulary of {len(self)}")
        return found

    def __len__(self) -> int:
        """Return the number of tokens. The ids are 0 to len - 1; a model may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a text; nothing is added at either end.

        Args:
            text: any text.
            special: if True, `<|endoftext|>` in the text is the token, as in Hugging Face; if False, it is plain text.

        Raises:
            TypeError: text is no str.
            ValueError: text holds half of a surrogate pair, which no text of UTF-8 can.
        """
        if not isinstance(text, str):
            check_text("Tokenizer.encode", text=text)
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: list[str], *, special: bool = True) -> list[list[int]]:
        """Return the token ids of each text. TOKENIZERS_PARALLELISM=false in the environment keeps it on one core.

        Raises:
            TypeError, ValueError: as `encode`.
        """
        check_flag("Tokenizer.encode", special=special)
        check_instance("Tokenizer.encode_batch", "texts", texts, (list, tuple), "a list of str")
        backend = self._backend if special else self._literal_backend
        # The backend would take a pair of texts too. It looks for surrogates itself, so we look only if it refuses.
        if not all(isinstance(text, str) for text in texts):
            list(texts_of("Tokenizer.encode_batch", texts))
        try:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except BaseException as error:
            list(texts_of("Tokenizer.encode", texts))
            raise (readable(error) or error) from None

    @cached_property
    def _literal_backend(self) -> tokenizers.Tokenizer:
        # A second object, because the switch is state that concurrent callers share.
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of the ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: token ids, each from 0 to len - 1.
            skip_special: leave out the special tokens, as Hugging Face does: `<|endoftext|>`, the end-of-text and
                padding tokens, and added tokens that are marked special.

        Raises:
            TypeError: an id is no whole number.
            ValueError: an id is outside the vocabulary.
        """
        check_flag("Tokenizer.decode", skip_special=skip_special)
        ids = whole_ids(ids)
        if skip_special:
            ids = [i for i in ids if i not in self._special_ids]
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of the ids, special tokens included.

        The bytes of consecutive calls concatenate, and a character may span several tokens. So decode a stream of ids
        with an incremental UTF-8 decoder, `codecs.getincrementaldecoder("utf-8")`.

        Raises:
            TypeError: an id is no whole number.
            ValueError: an id is outside the vocabulary.
        """
        ids = whole_ids(ids)
        table = self._token_bytes
        if ids and not 0 <= min(ids) <= max(ids) < len(table):
            wrong = next(i for i in ids if not 0 <= i < len(table))
            raise ValueError(f"decode: ids must be from 0 to {len(table) - 1}; got {shown(wrong)}")
        return b"".join(table[i] for i in ids)

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        added = {i: token.content for i, token in self._backend.get_added_tokens_decoder().items()}
        names = {i: token for token, i in self._backend.get_vocab(with_added_tokens=True).items()} | added
        if sorted(names) != list(range(len(self))):
            raise ValueError(f"Tokenizer: the ids must be 0 to {len(self) - 1} without a gap; "
                             f"the largest of the {len(names)} is {max(names)}")
        byte_of = {char: byte for byte, char in enumerate(byte_chars())}
        try:
            return [names[i].encode() if i in added else bytes(byte_of[char] for char in names[i])
                    for i in range(len(names))]
        except KeyError as error:
            raise ValueError(f"Tokenizer: tokens must be byte-level; {error.args[0]!r} stands for no byte") from None

    @cached_property
    def fingerprint(self) -> str:
        """The sha256, in hex, of everything that decides the ids: equal fingerprints mean equal ids for every text."""
        state = json.loads(self._backend.to_str())
        model = state["model"]
        content = {key: state[key] for key in ("added_tokens", "normalizer", "pre_tokenizer")} | {
            "vocab": sorted(model["vocab"].items(), key=lambda item: item[1]),
            "merges": [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]],
            "eos": self.eos_token,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers.AutoTokenizer reads them.

        Args:
            folder: made if it does not exist. Each of the two files is replaced atomically.

        Raises:
            TypeError, ValueError: folder is no path.
            OSError: a file cannot be written.
        """
        folder = user_path("Tokenizer.save", "folder", folder)
        write_file(folder / "tokenizer.json", self._backend.to_str())
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # the class that takes tokenizer.json as it stands
            "bos_token": self.eos_token, "eos_token": self.eos_token, "unk_token": self.eos_token,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,  # the cleaning of older versions changes code: "a ." -> "a."
        }
        if self.pad_token is not None:
            config["pad_token"] = self.pad_token
        write_file(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer from a folder with tokenizer.json, or vocab.json and merges.txt (and added_tokens.json).

        The added tokens of tokenizer_config.json count too.

        Raises:
            TypeError: folder is no path.
            ValueError: the files are missing, damaged or not a byte-level BPE.
        """
        folder = user_path("load_tokenizer", "folder", folder)
        try:
            backend, eos, pad = read_backend(folder)
            tokenizer = cls(backend, eos=eos, pad=pad)
            tokenizer._token_bytes  # noqa: B018  (builds the table, which checks the vocabulary)
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise ValueError(f"load_tokenizer: no tokenizer can be read from {folder}: {error}") from error
        return tokenizer


def load_tokenizer(name_or_folder: str | Path = "microsoft/phi-1", *, revision: str | None = None) -> Tokenizer:
    """Load phi-1's tokenizer, or the one in a folder or a Hub repository.

    Args:
        name_or_folder: a folder is read, as `load` reads it. "microsoft/phi-1", "microsoft/phi-1_5" and
            "microsoft/phi-2" give the built-in tokenizer with no network. Any other Hub id is fetched.
        revision: branch, tag or commit of the Hub repository, which is then fetched even if its tokenizer is built in.

    Raises:
        TypeError: an argument has another type.
        ValueError: no such folder or repository, it holds no byte-level BPE, or a folder with a revision.
    """
    folder = user_path("load_tokenizer", "name_or_folder", name_or_folder)
    if revision is not None:
        check_text("load_tokenizer", revision=revision)
    name = os.fspath(name_or_folder)
    if folder.is_dir() or (folder.suffix == ".gguf" and folder.is_file()):
        require(revision is None, "load_tokenizer", "revision goes with a Hub id", f"{revision!r}, {folder}")
        return Tokenizer.from_folder(folder)
    if name in BUILT_IN and revision is None:
        return _phi1_tokenizer()
    if not HUB_ID.fullmatch(name) or folder.exists():
        raise ValueError("load_tokenizer: name_or_folder must be a folder or a Hub id (owner/name); got "
                         f"{shown(name)}")
    from huggingface_hub import snapshot_download

    try:
        fetched = snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES))
    except Exception as error:  # a connection, authorisation or repository error has a class of its own
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"load_tokenizer: {name!r} is no folder, and the Hub did not give it: {reason}") from error
    return Tokenizer.from_folder(fetched)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with phi-1's rules: runs of whitespace are tokens, `<|endoftext|>` ends a document.

    The ids have phi-1's order: bytes, merges, `<|endoftext|>`, runs. The result depends on the texts alone, neither on
    their order nor on the number of cores. Few texts may give fewer merges, and so fewer tokens than vocab_size.

    Args:
        texts: the documents to learn merges from.
        vocab_size: the number of tokens of all kinds, 295 or more.

    Raises:
        TypeError: texts are no texts, or vocab_size is no whole number.
        ValueError: vocab_size is too small, or a text holds half of a surrogate pair.
    """
    check_whole("train_bpe", vocab_size=vocab_size)
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"train_bpe: texts must be an iterable of str; got {shown(texts)}")
    if vocab_size < MIN_VOCAB:
        raise ValueError(f"train_bpe: vocab_size must be at least {MIN_VOCAB} (256 bytes, {EOS} and {len(RUNS)} "
                         f"whitespace runs); got {vocab_size}")
    require(vocab_size < 2**31, "train_bpe", "vocab_size must be less than 2**31", vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=int(vocab_size) - 1 - len(RUNS), min_frequency=2, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # Encoding splits runs off before the merges apply, so training does too.
    pieces = (piece for text in texts_of("train_bpe", texts) for piece in RUN_PATTERN.split(text))
    backend.train_from_iterator(pieces, trainer)
    return Tokenizer(with_rules(backend, RUNS))


def _phi1_tokenizer() -> Tokenizer:
    merges = read_merges(gzip.decompress(MERGES_FILE.read_bytes()).decode())
    return Tokenizer(with_rules(tokenizers.Tokenizer(models.BPE(byte_level_vocab(merges), merges)), RUNS))
