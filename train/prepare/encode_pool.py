"""Tokenising in parallel processes: chunks of texts go in, their tokens come out in the same order.

Each worker is this file run as a script, with pickled messages on its pipes. Neither fork nor spawn of
`multiprocessing` would do: the tokenizer's threads may hold a lock in a fork, and spawn imports the caller's main
script, and with it torch, once more in each worker. A worker whose parent is gone finds its pipes ended, or its
tokenizer removed, and ends without a word.
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
"""Tokens, uint16 [n], of a chunk's documents, each followed by `<|endoftext|>`; tokens of each without, int64 [m]."""


class EncodePool:
    """A context manager that holds the worker processes, from its beginning to its end.

    Args:
        folder: a saved tokenizer of at most 65,536 tokens.
        workers: number of processes.
    """

    def __init__(self, folder: Path, workers: int) -> None:
        self._command = [sys.executable, "-P", __file__, str(folder)]
        self._workers: list[subprocess.Popen[bytes]] = []
        self._free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        # One a worker, to wait on its pipes; the tokenizer's own threads would make workers * cores of them.
        self._threads = ThreadPoolExecutor(workers)
        self._n_workers = workers

    def __enter__(self) -> EncodePool:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        try:
            for _ in range(self._n_workers):
                # In groups of their own, because Ctrl-C is for the parent, which ends them.
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
            worker.kill()  # nothing to lose: all that was asked for has been received, or is not wanted any more
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.wait()
            for pipe in (worker.stdin, worker.stdout):
                with contextlib.suppress(OSError):  # of what could not be sent any more
                    if pipe is not None:
                        pipe.close()

    def encode(self, chunks: Iterable[list[str]]) -> Iterator[Encoded]:
        """Tokens of each chunk of texts, in order. Few chunks are held at a time.

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
    """Tokens of a chunk. `<|endoftext|>` written in a text is text: only the end of a document is the token."""
    ids = [np.array([*document, tokenizer.eos_id], dtype=np.uint16)
           for document in tokenizer.encode_batch(texts, special=False)]
    return np.concatenate([np.empty(0, np.uint16), *ids]), np.array([one.size - 1 for one in ids], dtype=np.int64)


def serve(folder: str, requests: BinaryIO, replies: BinaryIO) -> None:
    """A worker's life: a chunk in, its tokens out, until its parent is gone."""
    try:
        tokenizer = Tokenizer.from_folder(folder)
    except ValueError:
        if not (Path(folder) / "tokenizer.json").exists():
            return
        raise
    with contextlib.suppress(EOFError, pickle.UnpicklingError, BrokenPipeError):  # UnpicklingError: in mid-message
        while True:
            texts = pickle.load(requests)
            pickle.dump(encode_chunk(tokenizer, texts), replies, protocol=pickle.HIGHEST_PROTOCOL)
            replies.flush()


if __name__ == "__main__":
    reply_pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing printed here can mix with the replies
    serve(sys.argv[1], sys.stdin.buffer, reply_pipe)
