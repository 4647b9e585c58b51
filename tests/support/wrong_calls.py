"""Wrong arguments of every public function, by the annotation of the parameter, drawn by a seed.

A call is right but for one argument. It must raise an error that names the function: nothing may accept it.
"""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from operation_cases import case
from tiny_models import TINY, tiny_model

import phi1
from phi1 import kernels
from phi1.arguments import shown
from phi1.config import Phi1Config
from phi1.generation import stream
from phi1.tokenizer import Tokenizer, train_bpe
from phi1.weights.huggingface import save_state_dict

HUGE = 10**30, -(10**30), 10**400
NO_NUMBER = True, False, "x", "", b"x", [1], (), {}, 1j, torch.tensor(1), np.zeros(2), object()
NO_WHOLE = *NO_NUMBER, *HUGE, 1.5, 2.0, float("nan"), float("inf"), np.float64(1), np.bool_(True)
NO_REAL = *NO_NUMBER, 10**400, float("nan"), float("inf"), -float("inf"), np.bool_(False)
NO_FLAG = 1, 0, "yes", 1.0, [], torch.tensor(True), np.True_, object()
NO_OBJECT = 5, True, 1.5, "x", b"x", [1], {}, (), object(), np.zeros(3)
NO_TENSOR = *NO_OBJECT, np.zeros((2, 2))
NO_WORD = 5, True, "", "nonsense", b"mean", ["mean"], 1.5, {}, object()
NO_TEXT = 5, 1.5, True, b"x", ["x"], {}, object(), "a\ud800b"
NO_PATH = 5, 1.5, True, "", "x\0y", b"x", ["x"], {}, object(), "~nobody-of-that-name/x"
NO_IDS = 5, 1.5, "abc", b"abc", [1.5], [True], ["x"], [-1], [10**6], [10**30], [[1]], [1, None], object()
NO_TEXTS = 5, "abc", b"abc", [5], ["a", b"x"], ["a\ud800b"], [("a", "b")], object()

WRONG: dict[str, tuple[Any, ...]] = {  # annotation without `| None` -> values that break it
    "int": NO_WHOLE, "float": NO_REAL, "bool": NO_FLAG, "torch.Tensor": NO_TENSOR, "Tensor": NO_TENSOR,
    "Dropout": NO_OBJECT, "tuple[Dropout | None, Dropout | None, Dropout | None]": (*NO_OBJECT, [None], [5, 5, 5]),
    "tuple[torch.Tensor, torch.Tensor]": (*NO_OBJECT, [None, None], (1, 2)), "str": NO_WORD, "Phi1Config": NO_OBJECT,
    "Cache": NO_OBJECT, "nn.Module": NO_OBJECT, "Phi1": (*NO_OBJECT, torch.nn.Linear(1, 1)), "Tokenizer": NO_OBJECT,
    "tokenizers.Tokenizer": NO_OBJECT, "str | Path": NO_PATH, "torch.device | str": (5, True, 1.5, "nonsense", "", [1]),
    "torch.dtype": (5, True, "float", [1], torch.int8, torch.bool, torch.complex64, torch.float8_e5m2),
    "torch.dtype | str": (5, True, "x", "", [1], torch.int8, torch.complex64), "Iterable[int]": NO_IDS,
    "list[str]": NO_TEXTS, "Iterable[str]": NO_TEXTS, "Mapping[str, Tensor]": (*NO_OBJECT, {"x": 5}, {5: 5}),
    "str | Sequence[str | Sequence[int]]": (*NO_IDS[:2], *NO_IDS[3:], "\ud800", ["x", 5], [[-1]], {}, [b"x"]),
    "str | Sequence[int]": (*NO_IDS[:2], *NO_IDS[3:], "\ud800", {}),
    "str | Sequence[str]": (5, True, [5], ["x", ""], ""),
    "object": (5, 0, "x", 2**70, None, [1], float("inf")),
}
TEXTS = {("encode", "text"), ("load", "revision"), ("load_tokenizer", "revision"), ("Tokenizer", "eos"),
         ("Tokenizer", "pad")}
RANGES: dict[str, tuple[Any, ...]] = {
    "eps": (0, -1.0), "label_smoothing": (-0.1, 1.0), "z_loss": (-1.0,), "workspace_mb": (0, -1), "p": (-0.1, 1.0),
    "valid_vocab": (0, -1, 10**6), "n_heads": (0, -1, 7), "batch": (0, -1, 7), "layer": (-1, 2**16), "kind": (-1, 16),
    "max_length": (0, -1, 65), "length": (-1, 7), "logits_to_keep": (-1,), "max_new_tokens": (0, -1), "top_k": (-1,),
    "temperature": (-1,), "top_p": (0, 1.5, -1), "seed": (-1,), "batch_size": (0, -1), "max_shard_bytes": (0, -1),
    "vocab_size": (0, -5, 294), "seq_len": (),
}
SHAPELESS = {"gelu", "layer_norm", "linear", "mlp", "add_layer_norm"}  # whose x may have any leading axes


@dataclass
class Call:
    """A right call of one function; `names` is the pattern of the names that a message may begin with."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    names: str
    annotations: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = {name: str(p.annotation) for name, p in inspect.signature(self.function).parameters.items()}
        self.annotations = {**given, **self.annotations}

    def wrong(self, random: random.Random) -> tuple[str, Any]:
        """Draw an argument and a value that is wrong for it."""
        name = random.choice(sorted(name for name in self.annotations if name not in ("self", "changes")))
        annotation = self.annotations[name]
        kind = annotation.removesuffix(" | None")
        own = NO_TEXT if (self.function.__name__, name) in TEXTS or (self.names, name) in TEXTS else WRONG[kind]
        values = [*own, *RANGES.get(name, ())]
        if kind == annotation and "None" not in kind:
            values.append(None)
        given = self.arguments.get(name)
        if isinstance(given, torch.Tensor):
            values += wrong_tensors(given, self.names not in SHAPELESS or name != "x")
        fine = FINE.get((self.names, name), lambda _: False)
        values = [x for x in values if not fine(x)]
        return name, random.choice(values)


FINE: dict[tuple[str, str], Callable[[Any], bool]] = {  # what a function does take
    ("dropout_add", "dropout"): lambda x: x is None,
    ("linear_cross_entropy", "bias"): lambda x: x is None,
    ("generate", "prompts"): lambda x: isinstance(x, list | tuple) and x in (["x"], (), [[1]]),
    (r"(Tokenizer\.)?decode", "ids"): lambda x: isinstance(x, dict),
    ("save", "card"): lambda x: isinstance(x, str),
    ("Cache", "batch"): lambda x: type(x) is int and x == 7,
    (r"Phi1\.init_weights", "seed"): lambda x: type(x) is int and x == -1,
    ("Dropout", "sample_ids"): lambda x: isinstance(x, torch.Tensor) and not x.is_nested and x.shape == (2,),
    ("Phi1Config", "vocab_size"): lambda x: type(x) is int and x == 294,
    ("attention_qkv", "qkv"): lambda x: isinstance(x, torch.Tensor) and not x.is_nested and x.shape[-1] == 32,
    ("gelu", "x"): lambda x: isinstance(x, torch.Tensor) and x.is_meta,
    ("rotary_?", "x"): lambda x: isinstance(x, torch.Tensor) and not x.is_nested and x.shape[-1] == 32,
}


def wrong_tensors(x: torch.Tensor, shaped: bool) -> list[torch.Tensor]:
    """Return tensors that are no dense ones of x's dtype, device and shape."""
    dtypes = (torch.bool, torch.complex64) + ((torch.int32, torch.int8) if x.is_floating_point() else (torch.float32,))
    wrong = [x.to_sparse(), x.to("meta"), torch.nested.nested_tensor([x, x]),
             *(x.to(dtype) for dtype in dtypes if dtype != x.dtype)]
    if x.is_floating_point():
        wrong += [x.double(), torch.quantize_per_tensor(x.detach(), 0.1, 0, torch.qint8)]
    return wrong + ([x[None], torch.cat((x, x), -1)] if shaped else [])


def operations() -> Iterator[Call]:
    """Yield a right call of every public name of phi1.kernels."""
    for name in ("layer_norm", "add_layer_norm", "rotary", "gelu", "dropout_add", "linear", "mlp", "attention",
                 "attention_qkv", "linear_cross_entropy", "parallel_block"):
        of = case(name)
        yield Call(getattr(kernels, name), of.tensors | of.options, "rotary_?" if name == "rotary" else name)
    block = case("parallel_block")
    own = {**block.tensors, **{key: block.options[key] for key in ("cos", "sin")}}
    yield Call(kernels.parallel_block_prefill, {**own, "n_heads": 2, "batch": 2}, "parallel_block_prefill")
    yield Call(kernels.parallel_block_decode, {**own, "kv": torch.zeros(2, 2, 5, 2, 16)}, "parallel_block_decode")
    of = case("rotary")
    yield Call(kernels.rotary_, of.tensors | of.options, "rotary_?")
    yield Call(kernels.Dropout, {"p": 0.1, "rng": torch.tensor([1, 2]), "sample_ids": torch.tensor([1])}, "Dropout")
    yield Call(entered(kernels.backend), {"name": "reference"}, "backend", {"name": "str"})
    yield Call(entered(kernels.check_values), {"enabled": True}, "check_values", {"enabled": "bool"})


def entered(manager: Callable[..., Any]) -> Callable[..., None]:
    """Return a function that enters and leaves a context."""
    def call(**arguments: Any) -> None:
        with manager(**arguments):
            pass

    call.__signature__ = inspect.signature(manager)  # type: ignore[attr-defined]
    return call


def model_calls(folder: Path) -> Iterator[Call]:
    """Yield a right call of every function and method of the model's API; files lie in `folder`."""
    model, tokenizer = tiny_model(), train_bpe(["x = 1\n"], 300)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    small = phi1.Phi1(Phi1Config(vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=1, rotary_dim=4, max_position_embeddings=64))
    phi1.save(small, folder / "model", tokenizer=tokenizer)
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    yield Call(Phi1Config, {}, "Phi1Config", {"rotary_dim": "int"})
    yield Call(phi1.preset, {"name": "nano"}, "preset")
    yield Call(TINY.flops_per_token, {"seq_len": 5}, "Phi1Config.flops_per_token", {"seq_len": "float"})
    yield Call(phi1.Cache, {"config": TINY, "batch": 2, "max_length": 9}, "Cache")
    yield Call(phi1.Cache(TINY, 2, 9).crop, {"length": 0}, r"Cache\.crop")
    yield Call(phi1.Phi1, {"config": TINY}, "Phi1")
    yield Call(model.init_weights, {}, r"Phi1\.init_weights")
    yield Call(model.forward, {"ids": ids, "attention_mask": torch.ones(2, 3, dtype=torch.bool),
                               "positions": torch.zeros(2, 3, dtype=torch.int64)}, "Phi1")
    numbers = torch.tensor([1, 2])
    yield Call(model.loss, {"ids": ids, "targets": ids, "rng": numbers, "sample_ids": numbers},
               r"Phi1(\.loss)?|linear_cross_entropy")
    yield Call(phi1.generate, {"model": small, "tokenizer": tokenizer, "prompts": "x", "max_new_tokens": 1}, "generate")
    yield Call(stream, {"model": small, "tokenizer": tokenizer, "prompt": "x", "max_new_tokens": 1}, "stream")
    yield Call(phi1.save, {"model": small, "folder": folder / "saved"}, "save")
    yield Call(save_state_dict, {"state": small.state_dict(), "config": small.config, "folder": folder / "saved"},
               "save")
    yield Call(phi1.load, {"name_or_folder": folder / "model"}, "load")
    yield Call(phi1.load_tokenizer, {"name_or_folder": folder / "model"}, "load_tokenizer")
    yield Call(Tokenizer, {"backend": backend}, "Tokenizer")
    yield Call(tokenizer.encode, {"text": "x"}, r"Tokenizer\.encode")
    yield Call(tokenizer.encode_batch, {"texts": ["x"]}, r"Tokenizer\.encode(_batch)?")
    yield Call(tokenizer.decode, {"ids": [1]}, r"(Tokenizer\.)?decode")
    yield Call(tokenizer.decode_bytes, {"ids": [1]}, r"(Tokenizer\.)?decode")
    yield Call(tokenizer.save, {"folder": folder / "tokenizer"}, r"Tokenizer\.save")
    yield Call(Tokenizer.from_folder, {"folder": folder / "model"}, "load_tokenizer")
    yield Call(train_bpe, {"texts": ["x"], "vocab_size": 300}, "train_bpe")
    yield Call(phi1.patch, {"model": small}, r"phi1\.patch", {"model": "nn.Module"})
    yield Call(phi1.unpatch, {"model": small}, r"phi1\.unpatch", {"model": "nn.Module"})
    yield Call(phi1.WorkingCopies, {"model": small, "dtype": torch.float32}, "WorkingCopies",
               {"dtype": "torch.dtype"})


def misbehaviour(call: Call, name: str, value: Any) -> str | None:
    """Make a wrong call. Return what is wrong with its outcome, or None."""
    try:
        call.function(**call.arguments | {name: value})
    except (TypeError, ValueError, NotImplementedError, FileNotFoundError) as error:
        text = str(error)
        named = re.match(rf"({call.names}):", text) and (name.split("_")[0] in text or name == "rotary")
        if named and "\n" not in text and len(text) < 500:
            return None
        return f"{type(error).__name__}: {text[:200]!r}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]!r}"
    return "accepted"


def described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {shown(value)}"
    shape = "nested" if value.is_nested else list(value.shape)
    return f"{value.dtype} {shape} {value.device} {value.layout}"


def campaign(folder: Path, seed: int, calls: int) -> list[str]:
    """Make so many wrong calls, and return a line for each that did not end well."""
    draw, found = random.Random(seed), []
    functions = [*operations(), *model_calls(folder)]
    for _ in range(calls):
        call = draw.choice(functions)
        name, value = call.wrong(draw)
        if outcome := misbehaviour(call, name, value):
            found.append(f"{call.names}({name}={described(value)}): {outcome}")
    return found
