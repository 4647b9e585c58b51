"""Real Python code as tokens in memory, in the trainer's corpus interface: no file is written, and no package needed
beyond what the tokenizer takes.

It is neither deduplicated nor split, as a corpus of `phi1 prepare` is: whoever times steps wants text that a model can
learn from, not a result.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi1.tokenizer import Tokenizer, load_tokenizer, train_bpe

LEFT_OUT = {"site-packages", "dist-packages"}


@dataclass(frozen=True, eq=False)
class CodeCorpus:
    """Documents, each followed by `<|endoftext|>`, as one stream of tokens.

    Args:
        folder: where the code came from.
        tokens: uint16 [n].
        vocab_size: every token is below it.
    """

    folder: Path
    tokens: np.ndarray
    vocab_size: int

    def n_samples(self, seq_len: int) -> int:
        """Rows of `seq_len` inputs and as many targets in the stream."""
        return max(0, (self.tokens.size - 1) // seq_len)

    def rows(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """int64 [B, seq_len + 1]: sample i begins at token i * seq_len."""
        return np.stack([self.tokens[i * seq_len:(i + 1) * seq_len + 1] for i in indices]).astype(np.int64)


def read_code(source: str, tokenizer: str, max_bytes: int) -> CodeCorpus:
    """The Python files of a folder, in the order of their paths, as far as `max_bytes` go.

    Args:
        source: a folder, or "stdlib": this Python's standard library.
        tokenizer: what load_tokenizer takes, or "train" for a BPE of 512 tokens, trained on the text.
        max_bytes: of text; the file that would exceed it and those behind it are left out.
    """
    folder = Path(sysconfig.get_path("stdlib") if source == "stdlib" else source)
    texts: list[str] = []
    for path in sorted(folder.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(folder).parts):
            max_bytes -= path.stat().st_size
            if max_bytes < 0:
                break
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    chosen = train_bpe(texts, 512) if tokenizer == "train" else load_tokenizer(tokenizer)
    return CodeCorpus(folder, _stream(texts, chosen), len(chosen))


def _stream(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    encoded = tokenizer.encode_batch(texts, special=False)
    return np.concatenate([np.array([*tokens, tokenizer.eos_id], np.uint16) for tokens in encoded])
