"""GGUF files, llama.cpp's format: a phi model is its architecture phi2, in one file with its tokenizer.

Matrices are F16 or Q8_0, vectors F32. q, k and v are one tensor, or three in files of other writers. Tensors are read
and written one by one. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phi1.arguments import check_instance, require, shown
from phi1.atomic import NEW, workspace
from phi1.config import Phi1Config
from phi1.gguf_tokenizer import add_tokenizer, gguf_package, open_gguf
from phi1.tokenizer import Tokenizer
from phi1.weights.layouts import Layout, ParameterSlice, misfits, parameter_slices

KINDS = ("f16", "q8_0")
_ARCHITECTURE = "phi2"
_FUSED = Layout(embed="token_embd", block="blk.{n}.", norm="attn_norm", qkv=("attn_qkv",), dense="attn_output",
                fc1="ffn_up", fc2="ffn_down", final_norm="output_norm", head="output")
_LAYOUTS = (_FUSED, replace(_FUSED, qkv=("attn_q", "attn_k", "attn_v")))


def save_gguf(state: Mapping[str, Tensor], config: Phi1Config, path: Path, *, tokenizer: Tokenizer, kind: str) -> None:
    """Write a model to a new file.

    Args:
        state: `Phi1.state_dict()`'s names and shapes.
        config: the model's configuration.
        path: the file. It appears complete or not at all.
        tokenizer: phi-1's, or another byte-level BPE that splits text by GPT-2's pattern.
        kind: "f16", or "q8_0" with 8 bits and a scale for every 32 numbers of a row.

    Raises:
        ValueError: path is taken, the tokenizer has rules that the format lacks, or a tensor does not fit the kind.
        OSError: no space or no permission; nothing is left behind.
    """
    require(kind in KINDS, "save_gguf", f"kind must be one of {', '.join(KINDS)}", shown(kind))
    check_instance("save_gguf", "config", config, Phi1Config, "a phi1.Phi1Config")
    check_instance("save_gguf", "tokenizer", tokenizer, Tokenizer, "one of phi1.load_tokenizer")
    gguf = gguf_package("save_gguf")
    matrices = gguf.GGMLQuantizationType[kind.upper()]
    table = parameter_slices(_FUSED, config)
    for name, part in table.items():
        require(kind == "f16" or len(part.shape) == 1 or part.shape[1] % 32 == 0, "save_gguf",
                f"q8_0 needs rows of a multiple of 32 numbers; give f16: {name}", list(part.shape))
    path = Path(os.path.realpath(path))
    require(not path.exists(), "save_gguf", "path must be new", shown(str(path)))
    with workspace(path) as work:
        writer = gguf.GGUFWriter(work / NEW, _ARCHITECTURE)
        _describe(writer, config, gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
        add_tokenizer(writer, tokenizer, config.vocab_size)
        if kind != "f16":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, part in table.items():
            stored = matrices if len(part.shape) == 2 else gguf.GGMLQuantizationType.F32
            block, size = gguf.GGML_QUANT_SIZES[stored]
            writer.add_tensor_info(name, part.shape, np.dtype(np.float32),
                                   int(np.prod(part.shape)) // block * size, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, part in table.items():
            tensor = state[part.parameter].detach()[part.index].to("cpu", torch.float32).contiguous()
            writer.write_tensor_data(_encoded(name, tensor, matrices, gguf) if tensor.dim() == 2 else tensor.numpy())
        writer.flush()
        for file in writer.fout:
            os.fsync(file.fileno())
        writer.close()
        os.link(work / NEW, path)  # fails if the name has been taken meanwhile


def _describe(writer: Any, config: Phi1Config, file_type: int) -> None:
    writer.add_name("phi-1")
    writer.add_file_type(file_type)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope_theta)


def _encoded(name: str, tensor: Tensor, kind: Any, gguf: Any) -> np.ndarray:
    """Return a matrix in F16 or Q8_0. Both hold numbers, or scales of blocks, in 16 bits."""
    largest = tensor.abs().max().item() / (127 if kind != gguf.GGMLQuantizationType.F16 else 1)
    require(largest <= torch.finfo(torch.float16).max, "save_gguf", f"{name} must be finite and fit in 16 bits; its "
            f"largest number is {tensor.abs().max().item():g} in", kind.name)
    if kind == gguf.GGMLQuantizationType.F16:
        return tensor.numpy().astype(np.float16)
    return gguf.quants.quantize(tensor.numpy(), kind)


def read_gguf(path: Path) -> tuple[Phi1Config, torch.dtype, Iterator[tuple[ParameterSlice, Tensor]], tuple[int, ...]]:
    """Return the configuration, the dtype of the matrices, the tensors with their places, and the ids that end a text.

    Q8_0 is read as float16.

    Raises:
        ValueError: no GGUF file, a damaged one, another architecture, a type other than F32, F16 and Q8_0, or tensors
            that do not fit the configuration.
    """
    reader = open_gguf("load", path)
    try:
        config = _config(reader)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"load: {path}: {error.args[0] if isinstance(error, KeyError) else error}") from None
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    table = parameter_slices(next((layout for layout in reversed(_LAYOUTS)
                                   if f"blk.0.{layout.qkv[0]}.weight" in shapes), _FUSED), config)
    problems = misfits({name: part.shape for name, part in table.items()}, shapes)
    if other := {kind for kind in types.values() if kind not in ("F32", "F16", "Q8_0")}:
        problems.append(f"of the types {', '.join(sorted(other))}, where F32, F16 and Q8_0 can be read")
    if problems:
        raise ValueError(f"load: the tensors in {path} cannot be read: {'; '.join(problems)}")
    dtype = torch.float32 if types["token_embd.weight"] == "F32" else torch.float16
    eos = _value(reader, "tokenizer.ggml.eos_token_id", None)
    return config, dtype, _tensors(reader, table), () if eos is None else (int(eos),)


def _tensors(reader: Any, table: dict[str, ParameterSlice]) -> Iterator[tuple[ParameterSlice, Tensor]]:
    gguf = gguf_package("load")
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        yield table[tensor.name], torch.from_numpy(np.array(data)).view(table[tensor.name].shape)


def _config(reader: Any) -> Phi1Config:
    architecture = _value(reader, "general.architecture")
    require(architecture == _ARCHITECTURE, "architecture", f"must be {_ARCHITECTURE}", shown(architecture))

    def of(key: str, default: Any = ...) -> Any:
        return _value(reader, f"{_ARCHITECTURE}.{key}", default)

    heads = of("attention.head_count")
    require(of("attention.head_count_kv", heads) == heads, "attention.head_count_kv", f"must be {heads}",
            of("attention.head_count_kv", heads))
    # A float32 of the file is the shortest decimal that gives it: 1e-5, and not 9.999999747378752e-06.
    decimal = (float(str(np.float32(of(*key)))) for key in (("attention.layer_norm_epsilon",),
                                                            ("rope.freq_base", 10000.0)))
    vocabulary = next((int(tensor.shape[-1]) for tensor in reader.tensors if tensor.name == "token_embd.weight"), 1)
    return Phi1Config(vocab_size=vocabulary, hidden_size=of("embedding_length"),
                      intermediate_size=of("feed_forward_length"), num_hidden_layers=of("block_count"),
                      num_attention_heads=heads, rotary_dim=of("rope.dimension_count"),
                      max_position_embeddings=of("context_length"), layer_norm_eps=next(decimal),
                      rope_theta=next(decimal))


def _value(reader: Any, key: str, default: Any = ...) -> Any:
    field = reader.get_field(key)
    if field is None and default is ...:
        raise KeyError(f"the key {key} is missing")
    return default if field is None else field.contents()
