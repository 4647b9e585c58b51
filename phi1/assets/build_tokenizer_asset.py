"""Rebuild `assets/gpt2-merges.gz` from public sources and check it against GPT-2's published hashes.

The package openai-whisper (MIT) holds GPT-2's vocabulary as byte strings in rank order. To find the merge of a token,
its bytes are merged with lower ranks only, until two parts remain. The rebuilt vocab.bpe and encoder.json must
have the sha256 sums that OpenAI's tiktoken pins for the two files of the GPT-2 release.

    python phi1/assets/build_tokenizer_asset.py [--archive openai_whisper-20250625.tar.gz]
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from itertools import pairwise
from pathlib import Path

from phi1.arguments import path_option
from phi1.tokenizer import MERGES_FILE
from phi1.tokenizer_rules import byte_chars, byte_level_vocab, read_merges

PACKAGE = "openai-whisper==20250625"
MEMBER = "whisper/assets/gpt2.tiktoken"
SHA256 = {
    "gpt2.tiktoken": "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def check(name: str, content: bytes) -> None:
    """Raise ValueError unless `content` has the sha256 published for the file `name`."""
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise ValueError(f"{name}: sha256 must be {SHA256[name]}; got {found}")


def download(folder: Path) -> Path:
    """Download the source archive of openai-whisper without installing it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
               "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode != 0:
        raise ValueError(f"pip could not download {PACKAGE}; fetch its .tar.gz elsewhere and name it with --archive")
    return next(folder.glob("*.tar.gz"))


def read_ranks(archive: Path) -> bytes:
    """Return the content of gpt2.tiktoken from the archive."""
    with tarfile.open(archive) as tar:
        member = next((m for m in tar.getmembers() if m.name.endswith(MEMBER)), None)
        content = tar.extractfile(member) if member is not None else None
        if content is None:
            raise ValueError(f"{archive}: it holds no {MEMBER}")
        return content.read()


def split_in_two(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two parts whose merge made `token`: merge the lowest rank first, until two parts are left."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def rebuild_vocab_bpe(tiktoken_file: bytes) -> bytes:
    """Return GPT-2's vocab.bpe, rebuilt from the token list of gpt2.tiktoken."""
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, tiktoken_file.splitlines())}
    chars = byte_chars()
    merges = ["#version: 0.2"]
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            merges.append(" ".join("".join(chars[byte] for byte in part) for part in split_in_two(token, ranks)))
    return ("\n".join(merges) + "\n").encode()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rebuild and check the compressed GPT-2 merges that phi1 ships.")
    parser.add_argument("--archive", type=path_option,
                        help=f"source archive of {PACKAGE}; the default downloads it with pip")
    parser.add_argument("--out", type=path_option, default=MERGES_FILE, help="file to write (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            ranks = read_ranks(args.archive or download(Path(folder)))
        check("gpt2.tiktoken", ranks)
        vocab_bpe = rebuild_vocab_bpe(ranks)
        check("vocab.bpe", vocab_bpe)
        check("encoder.json", json.dumps(byte_level_vocab(read_merges(vocab_bpe.decode()))).encode())
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_bytes(gzip.compress(vocab_bpe, compresslevel=9, mtime=0))
    except (OSError, ValueError, tarfile.TarError) as error:
        print(f"build_tokenizer_asset: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {args.out.stat().st_size:,} bytes; vocab.bpe and encoder.json have GPT-2's published sha256")
    return 0


if __name__ == "__main__":
    sys.exit(main())
