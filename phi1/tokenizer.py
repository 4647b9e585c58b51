"""phi-1's tokenizer, built in so that no network is needed, and small byte-level BPEs with the same rules.

phi-1 uses CodeGen's tokenizer (arXiv 2306.11644, section 2.3): GPT-2's byte-level BPE of 50,257 tokens, then a token
for each run of 31 down to 2 spaces (ids 50257 to 50286) and of 9 down to 2 tabs (ids 50287 to 50294). These runs are
split off the raw text first, leftmost and longest, so indentation costs one token. A single space joins the next word.

GPT-2's merges ship compressed as `assets/gpt2-merges.gz` (`build_tokenizer_asset.py` rebuilds it). The vocabulary
follows from them: the 256 bytes, one token a merge, and `<|endoftext|>`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from phi1.atomic import write_file

EOS = "<|endoftext|>"
RUNS = tuple(" " * n for n in range(31, 1, -1)) + tuple("\t" * n for n in range(9, 1, -1))
"""The whitespace runs that are tokens, in the order of their ids."""
BUILT_IN = ("microsoft/phi-1", "microsoft/phi-1_5", "microsoft/phi-2")
"""Hub ids whose tokenizer is the built-in one."""
MERGES_FILE = Path(__file__).with_name("assets") / "gpt2-merges.gz"
HUB_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json")
MIN_VOCAB = 256 + 1 + len(RUNS)

# The greedy pattern matches exactly what a leftmost-longest search for the tokens of RUNS matches.
_RUN_PATTERN = re.compile(r" {2,31}|\t{2,9}")


class Tokenizer:
    """A byte-level BPE: any text has ids, and the ids give back the exact bytes of the text.

    Args:
        backend: the `tokenizers` object underneath, a BPE model with a byte-level decoder.
        eos: the token that ends a document.
        pad: the padding token; None pads with `eos`.

    Raises:
        ValueError: `backend` is not a byte-level BPE, or lacks one of these tokens.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eos: str = EOS, pad: str | None = None) -> None:
        if not isinstance(backend.model, models.BPE) or not isinstance(backend.decoder, decoders.ByteLevel):
            raise ValueError("Tokenizer: backend must be a BPE with a ByteLevel decoder; got "
                             f"{type(backend.model).__name__} with {type(backend.decoder).__name__}")
        # A stored tokenizer may hold the settings of its last use; encode must return every id of a text.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_token = eos
        self.pad_token = pad
        self.eos_id = self._id_of(eos)
        self.pad_id = self.eos_id if pad is None else self._id_of(pad)

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
        """
        return self.encode_batch([text], special=special)[0]

    def encode_batch(self, texts: list[str], *, special: bool = True) -> list[list[int]]:
        """Return the token ids of each text. TOKENIZERS_PARALLELISM=false in the environment keeps it on one core."""
        backend = self._backend if special else self._literal_backend
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

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
            skip_special: leave out `<|endoftext|>` and the padding token.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        ids = list(map(int, ids))
        if skip_special:
            ids = [i for i in ids if i != self.eos_id and i != self.pad_id]
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the exact bytes of the ids, special tokens included.

        The bytes of consecutive calls concatenate, and a character may span several tokens. So decode a stream of ids
        with an incremental UTF-8 decoder, `codecs.getincrementaldecoder("utf-8")`.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        ids = list(map(int, ids))
        table = self._token_bytes
        if ids and not 0 <= min(ids) <= max(ids) < len(table):
            wrong = next(i for i in ids if not 0 <= i < len(table))
            raise ValueError(f"decode: ids must be from 0 to {len(table) - 1}; got {wrong}")
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
        """
        write_file(Path(folder) / "tokenizer.json", self._backend.to_str())
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # the class that takes tokenizer.json as it stands
            "bos_token": self.eos_token, "eos_token": self.eos_token, "unk_token": self.eos_token,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,  # the cleaning of older versions changes code: "a ." -> "a."
        }
        if self.pad_token is not None:
            config["pad_token"] = self.pad_token
        write_file(Path(folder) / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read a tokenizer from a folder with tokenizer.json, or vocab.json and merges.txt (and added_tokens.json).

        Raises:
            ValueError: the files are missing, damaged or not a byte-level BPE.
        """
        folder = Path(folder)
        try:
            if (folder / "tokenizer.json").is_file():
                backend = tokenizers.Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
            elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                backend = _from_vocab_files(folder)
            else:
                raise ValueError("it has neither tokenizer.json nor vocab.json with merges.txt")
            config = _read_json(folder / "tokenizer_config.json")
            eos, pad = _content(config.get("eos_token")), _content(config.get("pad_token"))
            tokenizer = cls(backend, eos=eos or EOS, pad=pad)
            tokenizer._token_bytes  # noqa: B018  (builds the table, which checks the vocabulary)
        except Exception as error:  # `tokenizers` raises bare Exceptions
            raise ValueError(f"load_tokenizer: no tokenizer can be read from {folder}: {error}") from error
        return tokenizer


def load_tokenizer(name_or_folder: str | Path = "microsoft/phi-1", *, revision: str | None = None) -> Tokenizer:
    """Load phi-1's tokenizer, or the one in a folder or a Hub repository.

    Args:
        name_or_folder: "microsoft/phi-1", "microsoft/phi-1_5" and "microsoft/phi-2" give the built-in tokenizer with no
            network; a folder is read; any other "owner/name" is fetched from the Hugging Face Hub.
        revision: branch, tag or commit, for a Hub repository.

    Raises:
        ValueError: no such folder or repository, or it holds no byte-level BPE.
    """
    name = str(name_or_folder)
    if name in BUILT_IN:
        return _phi1_tokenizer()
    if name and Path(name).is_dir():
        return Tokenizer.from_folder(name)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is None:
        raise ValueError(f"load_tokenizer: name_or_folder must be a folder or a Hub id (owner/name); got {name!r}")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES))
    except Exception as error:  # a connection, authorisation or repository error has a class of its own
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"load_tokenizer: {name!r} is no folder, and the Hub did not give it: {reason}") from error
    return Tokenizer.from_folder(folder)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with phi-1's rules: runs of whitespace are tokens, `<|endoftext|>` ends a document.

    The ids have phi-1's order: bytes, merges, `<|endoftext|>`, runs. The result depends on the texts alone, neither on
    their order nor on the number of cores. Few texts may give fewer merges, and so fewer tokens than vocab_size.

    Args:
        texts: the documents to learn merges from.
        vocab_size: the number of tokens of all kinds, 295 or more.

    Raises:
        ValueError: vocab_size is too small.
    """
    if vocab_size < MIN_VOCAB:
        raise ValueError(f"train_bpe: vocab_size must be at least {MIN_VOCAB} (256 bytes, {EOS} and {len(RUNS)} "
                         f"whitespace runs); got {vocab_size}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1 - len(RUNS), min_frequency=2, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    # Encoding splits runs off before the merges apply, so training does too.
    backend.train_from_iterator((piece for text in texts for piece in _RUN_PATTERN.split(text)), trainer)
    return Tokenizer(_with_rules(backend, RUNS))


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


def _phi1_tokenizer() -> Tokenizer:
    merges = read_merges(gzip.decompress(MERGES_FILE.read_bytes()).decode())
    return Tokenizer(_with_rules(tokenizers.Tokenizer(models.BPE(byte_level_vocab(merges), merges)), RUNS))


def _from_vocab_files(folder: Path) -> tokenizers.Tokenizer:
    vocab = _read_json(folder / "vocab.json")
    merges = read_merges((folder / "merges.txt").read_text(encoding="utf-8"))
    added = sorted(_read_json(folder / "added_tokens.json").items(), key=lambda item: int(item[1]))
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend = _with_rules(backend, [token for token, _ in added if token != EOS])
    moved = [token for token, i in added if backend.token_to_id(token) != i]
    if moved:
        raise ValueError(f"the id of {moved[0]!r} in added_tokens.json does not follow those before it")
    return backend


def _with_rules(backend: tokenizers.Tokenizer, added: Iterable[str]) -> tokenizers.Tokenizer:
    """Add byte-level splitting and decoding, `<|endoftext|>` and the tokens of `added`."""
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken(EOS, normalized=False)])
    backend.add_tokens([AddedToken(token, normalized=True) for token in added])
    return backend


def byte_chars() -> list[str]:
    """Return GPT-2's character for each byte: the byte itself if printable, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _content(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token
