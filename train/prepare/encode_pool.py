"""Tokenising in parallel processes: chunks of texts go in, their tokens come out in the same order.

Each worker is this file run as a script, with pickled messages on its pipes. `multiprocessing` does not fit: in a fork
the tokenizer's threads may hold a lock, and spawn imports the caller's main script, and with it torch, in each worker.
A worker whose parent is gone finds its pipes closed, or its tokenizer removed, and ends silently.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from phi1.tokenizer import Tokenizer
from phi1.train.data.shards import DataError

Encoded = tuple[np.ndarray, np.ndarray]
"""A chunk: tokens, uint16 [n], of its documents, each followed by `<|endoftext|>`; lengths without it, int64 [m]."""


class EncodePool:
    """Worker processes that tokenise, as a context manager: they start when it is entered and end when it is left.

    Args:
        folder: a saved tokenizer of at most 65,536 tokens.
        workers: number of processes.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        self._command = [sys.executable, "-P", __file__, str(folder)]
        self._workers: list[subprocess.Popen[bytes]] = []
        self._free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        # One thread per worker waits on its pipes. The tokenizer's own threads would come to workers * cores.
        self._threads = ThreadPoolExecutor(workers)
        self._n_workers = workers

    def __enter__(self) -> EncodePool:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        try:
            for _ in range(self._n_workers):
                # In process groups of their own, because Ctrl-C is for the parent, which ends them.
                worker = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                          env=environment, process_group=0)
                self._workers.append(worker)
                self._free.put(worker)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            worker.kill()  # loses nothing: all results have been received, or are no longer needed
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                with contextlib.suppress(OSError):  # from a message that could no longer be sent
                    if pipe is not None:
                        pipe.close()

    def encode(self, chunks: Iterable[list[str]]) -> Iterator[Encoded]:
        """Yield the tokens of each chunk of texts, in order. Few chunks are held at a time.

        Raises:
            DataError: a worker was killed.
        """
        waiting: deque[Future[Encoded]] = deque()
        for chunk in chunks:
            waiting.append(self._threads.submit(self._exchange, chunk))
            if len(waiting) > 2 * len(self._workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _exchange(self, texts: list[str]) -> Encoded:
        worker = self._free.get()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            pickle.dump(texts, worker.stdin)
            worker.stdin.flush()
            return pickle.load(worker.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            raise DataError(f"a tokenising process ended early, with status {worker.wait()} (negative: killed by that "
                            "signal; out of memory, perhaps: fewer workers need less)") from None
        finally:
            self._free.put(worker)


def encode_chunk(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    """Tokenise a chunk. The string `<|endoftext|>` within a text stays text; the token marks the end of a document."""
    ids = [np.array([*document, tokenizer.eos_id], dtype=np.uint16)
           for document in tokenizer.encode_batch(texts, special=False)]
    return np.concatenate([np.empty(0, np.uint16), *ids]), np.array([one.size - 1 for one in ids], dtype=np.int64)


def serve(folder: str, requests: BinaryIO, replies: BinaryIO) -> None:
    """Run a worker: read a chunk, write its tokens, until the parent is gone."""
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except ValueError:
        if not (Path(folder) / "tokenizer.json").exists():
            return
        raise
    with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):  # UnpicklingError: within a message
        while True:
            texts = pickle.load(requests)
            pickle.dump(encode_chunk(tokenizer, texts), replies, protocol=pickle.HIGHEST_PROTOCOL)
            replies.flush()


if __name__ == "__main__":
    reply_pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing printed here can mix with the replies
    serve(sys.argv[1], sys.stdin.buffer, reply_pipe)
