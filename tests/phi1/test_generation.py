"""Generation: the cache, the batch and the stream give the same text as plain decoding."""

import math
import pickle

import numpy as np
import pytest
import torch

import phi1
from phi1.config import Phi1Config
from phi1.generation import generate, stream
from phi1.model import Phi1
from phi1.tokenizer import train_bpe

CONFIG = Phi1Config(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    rotary_dim=4, max_position_embeddings=64)
PROMPTS = ["def add(a, b):", "x", "", "import os\n\n\ndef main():\n    print('hello, world')", "été"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["def f(x):\n    return x\n" * 3], 300)  # nearly all of its tokens are single bytes


def random_model(seed=0):
    """Return a model whose weights are so large that the next token depends on the whole context."""
    model = Phi1(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.4, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return random_model()


class Scripted(torch.nn.Module):
    """A stand-in for a model: it says the given tokens, whatever the prompt."""

    def __init__(self, tokens):
        super().__init__()
        self.config, self.tokens = CONFIG, tokens
        self.embed = torch.nn.Embedding(1, 1)

    def forward(self, ids, *, attention_mask=None, cache=None, logits_to_keep=0):
        first = cache.length == 0
        self.at = 0 if first else self.at + 1
        cache.length += ids.shape[1]
        logits = torch.zeros(len(ids), 1, CONFIG.vocab_size)
        logits[:, :, self.tokens[self.at % len(self.tokens)]] = 9.0
        return logits


def say(tokenizer, text, **options):
    """Run generate and stream with a model that says `text`. The two must agree."""
    scripted = Scripted(tokenizer.encode(text) + [tokenizer.eos_id])
    (completion,) = generate(scripted, tokenizer, "x", **options)
    pieces, streamed = drain(stream(scripted, tokenizer, "x", **options))
    assert "".join(pieces) == streamed == completion
    assert streamed.finish_reason == completion.finish_reason
    return completion, pieces


def drain(generator):
    pieces = []
    while True:
        try:
            pieces.append(next(generator))
        except StopIteration as end:
            return pieces, end.value


@torch.no_grad()
def plain_greedy(model, tokenizer, prompt, count):
    """Decode without cache or batch: the whole text goes through the model for each token."""
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    start = len(ids)
    while len(ids) < start + count:
        token = int(model(torch.tensor([ids]))[0, -1, : len(tokenizer)].argmax())
        if token == tokenizer.eos_id:
            break
        ids.append(token)
    return ids[start:]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_decoding_without_a_cache(model, tokenizer, prompt):
    (completion,) = generate(model, tokenizer, prompt, max_new_tokens=20)
    assert completion.token_ids == plain_greedy(model, tokenizer, prompt, 20)
    assert completion == tokenizer.decode(completion.token_ids)
    assert completion.seed is None
    assert completion.prompt_tokens == max(1, len(tokenizer.encode(prompt)))


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_prompt_does_not_depend_on_its_batch(model, tokenizer, temperature, batch_size):
    options = {"max_new_tokens": 25, "temperature": temperature, "top_k": 40, "top_p": 0.95}
    batch = generate(model, tokenizer, PROMPTS, seed=7, batch_size=batch_size, **options)
    assert len(set(batch)) == len(PROMPTS)
    for prompt, completion in zip(PROMPTS, batch, strict=True):
        (alone,) = generate(model, tokenizer, prompt, seed=completion.seed, **options)
        assert alone == completion
        assert vars(alone) == vars(completion)


def test_seeds(model, tokenizer):
    def sample(prompts, seed):
        return generate(model, tokenizer, prompts, max_new_tokens=12, temperature=1.0, seed=seed)

    assert sample("x", 3) == sample("x", 3) != sample("x", 4)
    first, second = sample(["x", "x"], 3)
    assert first.seed == 3
    assert first != second  # the same prompt twice gives two samples
    unseeded = [sample("x", None)[0] for _ in range(3)]
    assert len({completion.seed for completion in unseeded}) == 3
    assert sample("x", unseeded[0].seed)[0] == unseeded[0]


def test_ids_without_a_token_are_never_drawn(tokenizer):
    loud = random_model()
    with torch.no_grad():
        loud.head.bias[len(tokenizer) :] = 1e4
    for temperature in (0.0, 5.0):
        (completion,) = generate(loud, tokenizer, "x", max_new_tokens=30, temperature=temperature, seed=0)
        assert max(completion.token_ids) < len(tokenizer)


def test_end_of_text_ends(tokenizer):
    completion, _ = say(tokenizer, "return 1\n")
    assert (completion, completion.finish_reason) == ("return 1\n", "eos")
    assert completion.token_ids == tokenizer.encode("return 1\n")
    completion, pieces = say(tokenizer, "")
    assert (completion, completion.finish_reason, completion.token_ids, pieces) == ("", "eos", [], [])


@pytest.mark.parametrize(("stop", "text", "reason"), [
    ("\ndef", "return 1", "stop"),
    (["\nclass", "\ndef"], "return 1", "stop"),
    ("r", "", "stop"),
    ("ret", "", "stop"),
    ("urn 1\nde", "ret", "stop"),
    (["turn 1", "urn", "eturn 1"], "ret", "stop"),  # the one that is complete first
    (["urn", "eturn"], "r", "stop"),
    ("\ndefg", "return 1\ndef g(): pass\n", "eos"),
    ("pass\n\n", "return 1\ndef g(): pass\n", "eos"),
])
def test_stop_strings(tokenizer, stop, text, reason):
    completion, pieces = say(tokenizer, "return 1\ndef g(): pass\n", stop=stop)
    assert (completion, completion.finish_reason) == (text, reason)
    if reason == "stop":
        assert tokenizer.decode(completion.token_ids).startswith(text)
        assert all(piece for piece in pieces)


def test_a_stop_string_is_held_back_no_longer_than_it_may_begin(tokenizer):
    _, pieces = say(tokenizer, "a\nb\n\n\ncd", stop="\n\n\n\n")
    assert pieces == ["a", "\nb", "\n\n\nc", "d"]


def test_characters_are_never_split(tokenizer):
    text = "naïve → 数学 🎉 e\u0301"
    completion, pieces = say(tokenizer, text)
    assert completion == text
    assert len(tokenizer.encode(text)) > len(text)  # most characters take several tokens
    assert "\ufffd" not in "".join(pieces)
    cut, _ = say(tokenizer, "a🎉", max_new_tokens=3)  # ends within the character
    assert (cut, cut.finish_reason) == ("a\ufffd", "length")
    assert cut == tokenizer.decode(cut.token_ids)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_stream_joins_to_the_completion(model, tokenizer, temperature):
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 5, "stop": ["\x00\x00", "f"]}
    pieces, streamed = drain(stream(model, tokenizer, "def", **options))
    (completion,) = generate(model, tokenizer, "def", **options)
    assert "".join(pieces) == streamed == completion
    assert vars(streamed) == vars(completion)


def test_the_context_ends_a_completion(model, tokenizer):
    babble = random_model()
    with torch.no_grad():
        babble.head.bias[tokenizer.eos_id] = -1e4
    prompts = ["abcdefgh" * 7, "x", "abc" * 10]
    options = {"max_new_tokens": 1000}
    batch = generate(babble, tokenizer, prompts, **options)
    for prompt, completion in zip(prompts, batch, strict=True):
        assert completion.finish_reason == "length"
        assert len(completion.token_ids) + completion.prompt_tokens == CONFIG.max_position_embeddings
        assert generate(babble, tokenizer, [prompt], **options) == [completion]
    (short,) = generate(babble, tokenizer, "x", max_new_tokens=3)
    assert (len(short.token_ids), short.finish_reason) == (3, "length")


def test_a_completion_is_a_string(model, tokenizer):
    result = generate(model, tokenizer, ["x", tokenizer.encode("x")], max_new_tokens=5)
    assert [type(text) for text in result] == [phi1.generation.Completion] * 2
    assert result[0] == result[1] == str(result[0])
    again = pickle.loads(pickle.dumps(result[0]))
    assert again == result[0]
    assert vars(again) == vars(result[0])
    assert generate(model, tokenizer, []) == []


def test_the_model_is_left_as_it_was(tokenizer):
    model = random_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (completion,) = generate(model, tokenizer, "x", max_new_tokens=4)
    pieces = stream(model, tokenizer, "x", max_new_tokens=4)
    next(pieces)
    assert torch.is_grad_enabled()  # also while the stream is suspended
    assert not torch.is_inference_mode_enabled()
    pieces.close()
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert completion == generate(model.eval(), tokenizer, "x", max_new_tokens=4)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(model, tokenizer, dtype):
    half = Phi1(CONFIG, dtype=dtype)
    half.load_state_dict(model.state_dict())
    batch = generate(half, tokenizer, PROMPTS, max_new_tokens=8, temperature=0.8, seed=1)
    assert all(len(completion.token_ids) == 8 or completion.finish_reason == "eos" for completion in batch)


@pytest.mark.parametrize(("options", "match"), [
    ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more; got 0"),
    ({"temperature": -0.1}, r"temperature must be 0 \(greedy\) or more; got -0.1"),
    ({"temperature": math.nan}, "temperature must be"),
    ({"temperature": math.inf}, "temperature must be"),
    ({"top_k": -1}, "top_k must be"),
    ({"top_p": 0.0}, "top_p must be greater than 0"),
    ({"top_p": 1.1}, "top_p must be greater than 0"),
    ({"seed": -1}, "seed must be 0 or more; got -1"),
    ({"stop": ""}, "stop must be texts that are not empty"),
    ({"stop": ["\n", ""]}, "stop must be texts that are not empty"),
])
def test_argument_errors(model, tokenizer, options, match):
    with pytest.raises(ValueError, match="generate: " + match):
        generate(model, tokenizer, "x", **options)
    with pytest.raises(ValueError, match="stream: " + match):
        stream(model, tokenizer, "x", **options)  # before the first piece is asked for


def test_prompt_errors(model, tokenizer):
    with pytest.raises(ValueError, match=r"prompts\[1\] has 64 tokens, .* context of 64; shorten it to 63"):
        generate(model, tokenizer, ["x", "\u00e9" * 32])
    with pytest.raises(ValueError, match=r"prompt has token id 320, .*vocabulary ends at 319"):
        stream(model, tokenizer, [5, 320])
    with pytest.raises(ValueError, match=r"prompts\[0\] has token id -1"):
        generate(model, tokenizer, [[-1]])
    with pytest.raises(ValueError, match="must be valid Unicode text"):
        generate(model, tokenizer, "\udc80")
    with pytest.raises(TypeError, match=r"prompts\[0\] must be a str or a list of int token ids; got int"):
        generate(model, tokenizer, [5])
    with pytest.raises(TypeError, match=r"prompts\[0\] must be"):
        generate(model, tokenizer, [["x"]])
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        generate(model, tokenizer, "x", batch_size=0)


def test_nan_is_an_error_and_no_text(tokenizer):
    broken = random_model()
    with torch.no_grad():
        broken.norm.weight[3] = math.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="nan or inf"):
            generate(broken, tokenizer, "x", temperature=temperature)


def test_the_models_own_end_ids_end_a_completion(tokenizer):
    model = Scripted([8, 9, 7, 8])
    model.end_ids = (300, 7)
    (completion,) = generate(model, tokenizer, "x", max_new_tokens=5)
    assert (completion.token_ids, completion.finish_reason) == ([8, 9], "eos")


def test_whole_numbers_of_numpy_are_ids_and_options(model, tokenizer):
    (ours,), (theirs,) = (generate(model, tokenizer, [[number(5), number(6)]], max_new_tokens=number(3),
                                   top_k=number(2), temperature=1.0, seed=number(3)) for number in (int, np.int64))
    assert ours == theirs
