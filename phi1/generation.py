"""Text generation: greedy or sampled, in batches or as a stream.

Each prompt has its own random numbers, so its completion does not depend on the other prompts of the batch. A batch is
padded on the left. One pass fills the key-value cache from the prompts, then each new token is one pass.

B prompts in a batch, T tokens, V ids that have a token.
"""

from __future__ import annotations

import codecs
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from phi1.arguments import check_instance, check_text, check_whole, is_whole, shown
from phi1.config import Phi1Config
from phi1.model import Cache, Phi1
from phi1.sampling import SamplingParams, prompt_seed, sample_tokens, uniform_numbers
from phi1.tokenizer import Tokenizer
from phi1.tokenizer_rules import check_tokenizer


class Completion(str):
    """The text after the prompt, a string, with the facts of its generation."""

    token_ids: list[int]
    """The generated ids without the end of text; those of a stop string are included."""
    finish_reason: str
    """`eos` (end of text, or one of the model's `end_ids`), `stop` (a stop string) or `length` (max_new_tokens, or the
    context is full)."""
    prompt_tokens: int
    """Tokens of the prompt."""
    seed: int | None
    """The seed that gives this completion again for its prompt alone; None for greedy decoding."""

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
        tokenizer: the model's tokenizer. Ids from len(tokenizer) on are never drawn. A completion ends at its
            end-of-text token and at the model's `end_ids`.
        prompts: a text, or a list whose elements are texts or lists of token ids. An empty prompt starts a new document
            from `<|endoftext|>`.
        max_new_tokens: upper bound for each prompt; fewer if the model's context ends before.
        temperature: 0 takes the likeliest token; a value above 0 divides the logits, and a token is drawn.
        top_k: draw from the k likeliest tokens; 0 from all. Applied after the temperature.
        top_p: draw from the likeliest tokens that together have this probability; 1 from all. Applied after top_k.
        seed: seed of the random numbers, 0 or more. The first prompt uses `seed` itself; the seed of each other one
            follows from `seed` and the prompt's index. None draws a seed.
        stop: one or more texts; the completion ends before the first one that it contains.
        batch_size: the number of prompts that are decoded together.

    Returns:
        One `Completion`, a str, for each prompt, in the order of the prompts.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument out of its range, a prompt that leaves no room in the context, or a token id outside
            the model's vocabulary.
        FloatingPointError: the model computed nan or inf.
    """
    _check_pair("generate", model, tokenizer)
    params = SamplingParams.check("generate", max_new_tokens, temperature, top_k, top_p, seed, stop)
    check_whole("generate", low=1, batch_size=batch_size)
    if isinstance(prompts, str):
        prompts = [prompts]
    check_instance("generate", "prompts", prompts, (list, tuple), "a str or a list")
    requests = [_request("generate", f"prompts[{i}]", model, tokenizer, prompt, params, i)
                for i, prompt in enumerate(prompts)]
    for batch in _batches(requests, model.config.max_position_embeddings, batch_size):
        for tokens in _decode(model, batch, params, len(tokenizer)):
            for request, token in zip(batch, tokens, strict=True):
                request.take(token)
            if all(request.finish_reason for request in batch):
                break
    return [request.completion() for request in requests]


def stream(model: Phi1, tokenizer: Tokenizer, prompt: str | Sequence[int], *,
           max_new_tokens: int = 256, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
           seed: int | None = None, stop: str | Sequence[str] = ()) -> Generator[str, None, Completion]:
    """Complete one prompt, piece by piece as it is decoded.

    A piece never ends within a character. Text that may begin a stop string is held back until the next tokens decide.
    The joined pieces equal the result of `generate` for the same arguments.

    Args:
        model, tokenizer, max_new_tokens, temperature, top_k, top_p, seed, stop: as for `generate`.
        prompt: a text or a list of token ids.

    Returns:
        A generator of pieces of text, whose return value (`result = yield from stream(...)`) is the `Completion`.

    Raises:
        TypeError, ValueError: as `generate`, before the first piece.
        FloatingPointError: the model computed nan or inf.
    """
    _check_pair("stream", model, tokenizer)
    params = SamplingParams.check("stream", max_new_tokens, temperature, top_k, top_p, seed, stop)
    return _pieces(model, _request("stream", "prompt", model, tokenizer, prompt, params, 0), params, len(tokenizer))


def _pieces(model: Phi1, request: _Request, params: SamplingParams, n_ids: int) -> Generator[str, None, Completion]:
    for (token,) in _decode(model, [request], params, n_ids):
        piece = request.take(token)
        if piece:
            yield piece
        if request.finish_reason:
            break
    return request.completion()


def _check_pair(caller: str, model: object, tokenizer: object) -> None:
    if not callable(model) or not isinstance(getattr(model, "config", None), Phi1Config):  # compiled or not
        raise TypeError(f"{caller}: model must be a phi1.Phi1; got {shown(model)}")
    check_tokenizer(caller, tokenizer, "eos_id", "encode", "decode_bytes", "__len__")


class _Text:
    """Incremental decoder: tokens in, whole characters out, except text that may belong to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def take(self, token: int) -> str:
        """Add a token and return the text that is now certain."""
        return self._release(self._characters.decode(self._tokenizer.decode_bytes((token,))))

    def rest(self) -> str:
        """Return the text still held back, after the last token. The bytes of a cut character become U+FFFD."""
        text = self._release(self._characters.decode(b"", final=True))
        return text if self.stopped else text + self._held

    def _release(self, text: str) -> str:
        if not self._stop:
            return text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]  # the stop string that ends first, for any split of the text into tokens
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class _Request:
    """One prompt and the tokens decoded for it."""

    ids: list[int]
    limit: int  # the most new tokens
    seed: int | None
    end_ids: frozenset[int]
    text: _Text
    token_ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: str = ""  # empty until the request has finished

    def take(self, token: int) -> str:
        """Append a token and return the text that is now certain."""
        if self.finish_reason:
            return ""
        piece = ""
        if token in self.end_ids:
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


def _request(caller: str, what: str, model: Phi1, tokenizer: Tokenizer, prompt: str | Sequence[int],
             params: SamplingParams, index: int) -> _Request:
    ids = _encode(caller, what, tokenizer, prompt) or [tokenizer.eos_id]
    context, vocab = model.config.max_position_embeddings, model.config.vocab_size
    outside = next((i for i in ids if not 0 <= i < vocab), None)
    if outside is not None:
        raise ValueError(f"{caller}: {what} has token id {outside}, and the model's vocabulary ends at {vocab - 1}; "
                         "give the tokenizer that the model was trained with")
    if len(ids) >= context:
        raise ValueError(f"{caller}: {what} has {len(ids)} tokens, which leaves no room in the model's context of "
                         f"{context}; shorten it to {context - 1} or fewer")
    seed = None if params.seed is None else prompt_seed(params.seed, index)
    return _Request(ids, min(params.max_new_tokens, context - len(ids)), seed,
                    frozenset((tokenizer.eos_id, *getattr(model, "end_ids", ()))), _Text(tokenizer, params.stop))


def _encode(caller: str, what: str, tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    if isinstance(prompt, str):
        check_text(caller, **{what: prompt})
        return tokenizer.encode(prompt)
    if not isinstance(prompt, list | tuple):
        raise TypeError(f"{caller}: {what} must be a str or a list of int token ids; got {type(prompt).__name__}")
    wrong = next((i for i in prompt if not is_whole(i)), None)
    if wrong is not None or None in prompt:
        raise TypeError(f"{caller}: {what} must be a str or a list of int token ids; got {shown(wrong)} in it")
    return [int(i) for i in prompt]


def _batches(requests: list[_Request], context: int, size: int) -> Iterator[list[_Request]]:
    """Yield batches of requests of similar length; padding must not push a request past the context."""
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
def _decode(model: Phi1, requests: list[_Request], params: SamplingParams, n_ids: int) -> Iterator[list[int]]:
    """Yield the next token of every request, step by step up to the largest limit."""
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
            tokens = sample_tokens(logits[:, -1, :n_ids].float(), params, uniform[step])
            yield tokens.tolist()
            if step + 1 < steps:
                logits = model(tokens[:, None], cache=cache, logits_to_keep=1)
    finally:
        model.train(training)


def _left_padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return ids [B, T] with zeros on the left of shorter prompts, and their mask; None if all lengths are equal."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    if all(len(prompt) == longest for prompt in prompts):
        return ids, None
    starts = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    return ids, torch.arange(longest, device=device) >= starts[:, None]
