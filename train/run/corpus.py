"""The corpus of a run: prepared if it is missing, opened by every process, and verified again at the end."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Callable
from pathlib import Path

from phi1.tokenizer import Tokenizer
from phi1.train.data.corpus import Corpus, open_corpus
from phi1.train.data.shards import MANIFEST, read_manifest
from phi1.train.recipe.recipe import Recipe
from phi1.train.runtime.launch import Rank, RunError, say


def prepare_data(recipe: Recipe) -> None:
    """Make the corpus if its folder is missing or empty.

    Raises:
        RunError: it cannot be made, or the existing one was made from another source than the recipe asks for.
    """
    from phi1.train.prepare.prepare import prepare

    data, folder = recipe.data, Path(recipe.data.folder)
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            say(f"preparing {folder} from {data.source}")
            say(str(prepare(data.source, folder, tokenizer=data.tokenizer, vocab_size=data.vocab_size,
                            workers=data.workers, report=say)))
    except (ValueError, OSError) as error:
        raise RunError(f"data.folder {folder}: {error}") from None
    made_from = _made_from(recipe)
    if data.source != Recipe().data.source and not any(_same_source(data.source, source) for source in made_from):
        raise RunError(f"data.folder {folder} was made from {', '.join(made_from)}, not from data.source "
                       f"{data.source}; give another --data.folder for it")


def _made_from(recipe: Recipe) -> list[str]:
    """Return the sources that the corpus was made from, as they were given."""
    data, folder = recipe.data, Path(recipe.data.folder)
    size = f" --vocab-size {data.vocab_size}" if data.tokenizer == "train" else ""
    again = (f"phi1 prepare --source {shlex.quote(data.source)} --tokenizer {shlex.quote(data.tokenizer)}{size} "
             f"--out {shlex.quote(data.folder)} --force")
    if not (folder / MANIFEST).exists():
        raise RunError(f"data.folder {folder}: it is there, but holds no corpus (no {MANIFEST}); give another "
                       f"--data.folder, or make the corpus with: {again}")
    try:
        return read_manifest(folder)["made"].get("sources", [])
    except ValueError as error:
        raise RunError(f"data.folder: {error} with: {again}") from None
    except OSError as error:
        raise RunError(f"data.folder: {error.filename}: {error.strerror}") from None


def _same_source(one: str, other: str) -> bool:
    """Return True if two names mean one source: they are equal, or name the same folder."""
    if one == other or "stdlib" in (one, other):
        return one == other
    return Path(one).is_dir() and Path(one).resolve() == Path(other).resolve()


def open_data(recipe: Recipe, fingerprint: str | None = None, verify: bool = True) -> tuple[Corpus, Corpus, Tokenizer]:
    """Open the training split, the validation split and the tokenizer of a prepared corpus.

    Args:
        recipe: names the folder.
        fingerprint: of the corpus that the run began with; None accepts any.
        verify: read all of it and compare its hashes.

    Raises:
        RunError: it is damaged, does not fit the model, is too small for one batch, or was replaced by another.
    """
    folder, vocab_size = Path(recipe.data.folder), recipe.phi1_config().vocab_size
    try:
        train, validation = (open_corpus(folder, split, verify=verify) for split in ("train", "val"))
        train.require_samples(recipe.data.seq_len, recipe.train.batch_size)
        validation.require_samples(recipe.data.seq_len, 1)
        tokenizer = train.load_tokenizer()
        found = [train.fingerprint, validation.fingerprint, read_manifest(folder)["fingerprint"]]
    except ValueError as error:  # DataError, and what the tokenizer raises
        raise RunError(str(error)) from None
    except OSError as error:
        raise RunError(f"data.folder {folder}: {error.strerror}") from None
    if other := set(found) - {fingerprint or found[0]}:
        raise RunError(f"data.folder {folder}: another corpus has taken its place since the run began (fingerprint "
                       f"{(fingerprint or found[0])[:12]}, now {min(other)[:12]}); give the same command again")
    if train.vocab_size > vocab_size:
        raise RunError(f"model.vocab_size must be at least {train.vocab_size}, the number of token ids in {folder}; "
                       f"got {vocab_size}")
    return train, validation, tokenizer


def open_on_all_ranks(recipe: Recipe, fingerprint: str, rank: Rank) -> tuple[Corpus, Corpus, Tokenizer]:
    """Collective: `open_data` on every process; the first process of each machine but rank 0's verifies it.

    Raises:
        Failed: on every process, if one cannot.
    """
    from phi1.train.runtime.all_ranks import all_ranks, fail  # imports torch, which a complete run does not need

    def open_own() -> tuple[Corpus, Corpus, Tokenizer]:
        try:
            return open_data(recipe, fingerprint, verify=rank.rank > 0 and rank.local_rank == 0)
        except RunError as error:
            fail(f"rank {rank.rank} on {socket.gethostname()}: {error}" if rank.rank else str(error))

    [opened] = all_ranks(open_own, keep=True)
    return opened


def read_again(recipe: Recipe, fingerprint: str, rank: Rank, report: Callable[[str], None]) -> None:
    """Collective, at the end: one process of each machine verifies that its corpus has not changed during the run."""
    from phi1.train.runtime.all_ranks import Failed, all_ranks

    try:
        all_ranks(lambda: open_data(recipe, fingerprint) if rank.local_rank == 0 else None, keep=True)
    except Failed as error:
        report(f"warning: the corpus has changed since it was last read; what was trained on was whole: {error}")
