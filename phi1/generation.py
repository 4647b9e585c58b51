"""Text from a model: greedy or sampled, in batches or as a stream.

Each prompt has its own random numbers, so what it gives does not depend on the prompts beside it. A batch is padded
on the left; one pass takes the prompts in, then each new token is one pass over the key-value cache.

B prompts in a batch, T tokens, V ids that have a token.
"""

from __future__ import annotations

import codecs
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from phi1.model import Cache, Phi1
from phi1.sampling import Rules, choose, prompt_seed, uniform_numbers

if TYPE_CHECKING:
    from phi1.tokenizer import Tokenizer


class Completion(str):
    """A completion: a string, the text after the prompt, that also knows how it came about."""

    token_ids: list[int]
    """The ids that were drawn, without the end of text; those of a stop string are among them."""
    finish_reason: str
    """`eos` (end of text), `stop` (a stop string) or `length` (max_new_tokens, or the context is full)."""
    prompt_tokens: int
    """Tokens of the prompt."""
    seed: int | None
    """That gives this completion again when its prompt is alone; None for greedy decoding."""

    def __new__(cls, text: str, token_ids: Sequence[int] = (), finish_reason: str = "length", prompt_tokens: int = 0,
                seed: int | None = None) -> Completion:
        self = super().__new__(cls, text)
        self.token_ids, self.finish_reason = list(token_ids), finish_reason
        self.prompt_tokens, self.seed = prompt_tokens, seed
        return self


def generate(model: Phi1, tokenizer: Tokenizer, prompts: str | Sequence[str | Sequence[int]], *,
             max_new_tokens: int = 256, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
             seed: int | None = None, stop: str | Sequence[str] = (), batch_size: int = 16) -> list[Completion]:
    """Complete one or more prompts.

    Args:
        model: on any device, in any dtype. Sampling is float32 arithmetic.
        tokenizer: the model's. Ids from len(tokenizer) on are never drawn.
        prompts: a text, or a list whose elements are texts or lists of token ids. An empty one starts a new document,
            from `<|endoftext|>`.
        max_new_tokens: upper bound for each prompt; less where the model's context ends.
        temperature: 0 takes the likeliest token; above 0 the logits are divided by it and a token is drawn.
        top_k: draw from the k likeliest tokens; 0 from all. Applied after the temperature.
        top_p: draw from the likeliest tokens that together have this probability; 1 from all. Applied after top_k.
        seed: of the random numbers, 0 or more; each prompt's follow from it and from the prompt's place in the list,
            the first one's being `seed` itself. None takes a fresh one.
        stop: a text or several; the completion ends before the first one that is complete in it.
        batch_size: prompts that are decoded together.

    Returns:
        One `Completion`, a str, for each prompt, in their order.

    Raises:
        ValueError: an argument out of its range, a prompt that leaves no room in the context, or a token id outside
            the model's vocabulary.
        FloatingPointError: the model computed nan or inf.
    """
    rules = Rules.check("generate", max_new_tokens, temperature, top_k, top_p, seed, stop)
    if batch_size < 1:
        raise ValueError(f"generate: batch_size must be 1 or more; got {batch_size}")
    if isinstance(prompts, str):
        prompts = [prompts]
    requests = [_request("generate", f"prompts[{i}]", model, tokenizer, prompt, rules, i)
                for i, prompt in enumerate(prompts)]
    for batch in _batches(requests, model.config.max_position_embeddings, batch_size):
        for tokens in _decode(model, batch, rules, len(tokenizer)):
            for request, token in zip(batch, tokens, strict=True):
                request.take(token)
            if all(request.finish_reason for request in batch):
                break
    return [request.completion() for request in requests]


def stream(model: Phi1, tokenizer: Tokenizer, prompt: str | Sequence[int], *,
           max_new_tokens: int = 256, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
           seed: int | None = None, stop: str | Sequence[str] = ()) -> Generator[str, None, Completion]:
    """Complete one prompt, piece by piece as it is decoded.

    A piece never ends within a character, and what may be the beginning of a stop string is held back until it is
    known not to be one. Joined, the pieces are what `generate` gives for the same arguments.

    Args:
        model, tokenizer, max_new_tokens, temperature, top_k, top_p, seed, stop: as for `generate`.
        prompt: a text or a list of token ids.

    Returns:
        A generator of pieces of text, whose return value (`result = yield from stream(...)`) is the `Completion`.

    Raises:
        ValueError: as `generate`, before the first piece.
        FloatingPointError: the model computed nan or inf.
    """
    rules = Rules.check("stream", max_new_tokens, temperature, top_k, top_p, seed, stop)
    return _pieces(model, _request("stream", "prompt", model, tokenizer, prompt, rules, 0), rules, len(tokenizer))


def _pieces(model: Phi1, request: _Request, rules: Rules, n_ids: int) -> Generator[str, None, Completion]:
    for (token,) in _decode(model, [request], rules, n_ids):
        piece = request.take(token)
        if piece:
            yield piece
        if request.finish_reason:
            break
    return request.completion()


class _Text:
    """Text from tokens: whole characters alone, and nothing that may belong to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def take(self, token: int) -> str:
        """The text that this token makes certain."""
        return self._release(self._characters.decode(self._tokenizer.decode_bytes((token,))))

    def rest(self) -> str:
        """What is still held back, once no token follows; bytes of a character that was cut become U+FFFD."""
        text = self._release(self._characters.decode(b"", final=True))
        return text if self.stopped else text + self._held

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]  # of the one that ends first, however the text falls into tokens
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class _Request:
    """One prompt and what has been decoded for it."""

    ids: list[int]
    limit: int  # tokens that it may get
    seed: int | None
    eos_id: int
    text: _Text
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str = ""  # empty while it goes on

    def take(self, token: int) -> str:
        """Append a token; returns the text that it makes certain."""
        if self.finish_reason:
            return ""
        piece = ""
        if token == self.eos_id:
            self.finish_reason = "eos"
        else:
            self.token_ids.append(token)
            piece = self.text.take(token)
            if self.text.stopped:
                self.finish_reason = "stop"
            elif len(self.token_ids) == self.limit:
                self.finish_reason = "length"
        if self.finish_reason in ("eos", "length"):
            piece += self.text.rest()
            if self.text.stopped:  # a cut character became U+FFFD, which can complete a stop string
                self.finish_reason = "stop"
        self.pieces.append(piece)
        return piece

    def completion(self) -> Completion:
        return Completion("".join(self.pieces), self.token_ids, self.finish_reason, len(self.ids), self.seed)


def _request(caller: str, what: str, model: Phi1, tokenizer: Tokenizer, prompt: str | Sequence[int], rules: Rules,
             index: int) -> _Request:
    ids = _encode(caller, what, tokenizer, prompt) or [tokenizer.eos_id]
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    outside = next((i for i in ids if not 0 <= i < vocab), None)
    if outside is not None:
        raise ValueError(f"{caller}: {what} has token id {outside}, and the model's vocabulary ends at {vocab - 1}; "
                         "give the tokenizer that the model was trained with")
    if len(ids) >= context:
        raise ValueError(f"{caller}: {what} has {len(ids)} tokens, which leaves no room in the model's context of "
                         f"{context}; shorten it to {context - 1} or fewer")
    seed = None if rules.seed is None else prompt_seed(rules.seed, index)
    return _Request(ids, min(rules.max_new_tokens, context - len(ids)), seed, tokenizer.eos_id,
                    _Text(tokenizer, rules.stop))


def _encode(caller: str, what: str, tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{caller}: {what} is not valid Unicode text: {error}") from error
        return tokenizer.encode(prompt)
    ids = [i for i in prompt if isinstance(i, int)] if isinstance(prompt, Sequence) else None
    if ids is None or len(ids) < len(prompt):
        raise TypeError(f"{caller}: {what} must be a str or a list of int token ids; got {type(prompt).__name__}")
    return ids


def _batches(requests: list[_Request], context: int, size: int) -> Iterator[list[_Request]]:
    """Requests of like length together; padding must not push any of them past the context."""
    batch: list[_Request] = []
    for request in sorted(requests, key=lambda request: len(request.ids), reverse=True):
        longest, steps = len((batch or [request])[0].ids), max(other.limit for other in [*batch, request])
        if batch and (len(batch) == size or longest + steps > context):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


@torch.inference_mode()
def _decode(model: Phi1, requests: list[_Request], rules: Rules, n_ids: int) -> Iterator[list[int]]:
    """The next token of every request, again and again up to the largest limit."""
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    longest, steps = max(len(request.ids) for request in requests), max(request.limit for request in requests)
    cache = Cache(model.config, len(requests), longest + steps - 1, device=device, dtype=dtype)
    uniform = uniform_numbers([request.seed for request in requests], steps).to(device)
    training = model.training
    model.eval()
    try:
        ids, mask = _left_padded([request.ids for request in requests], device)
        logits = model(ids, attention_mask=mask, cache=cache, logits_to_keep=1)
        for step in range(steps):
            tokens = choose(logits[:, -1, :n_ids].float(), rules, uniform[step])
            yield tokens.tolist()
            if step + 1 < steps:
                logits = model(tokens[:, None], cache=cache, logits_to_keep=1)
    finally:
        model.train(training)


def _left_padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """ids [B, T], with zeros on the left of the shorter prompts, and the mask; no mask where all are as long."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return ids, None
    starts = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    return ids, torch.arange(longest, device=device) >= starts[:, None]
