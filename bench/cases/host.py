"""The host's work around the model, the same on every machine: batches of a corpus, tokenisation, loading, saving."""

from __future__ import annotations

import atexit
import copy
import shutil
import sysconfig
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phi1.bench.cases.model import build
from phi1.bench.harness.case import BOTH, Case, Function, Inputs, Provider, named
from phi1.bench.harness.inputs import Draw
from phi1.bench.harness.providers import ours, ours_prepared, peer
from phi1.config import Phi1Config, preset

SEQ_LEN, BATCH = 512, 64


def cases() -> list[Case]:
    """Every case of the host's work."""
    nano, phi1 = preset("nano"), preset("phi1")
    return [_batches(), _tokenise(), _load(BOTH, "nano", nano, quick=True), _save(BOTH, "nano", nano, quick=True),
            _load(("cuda",), "phi1", phi1, quick=False), _save(("cuda",), "phi1", phi1, quick=False)]


@cache
def _scratch() -> Path:
    """A folder that lives as long as the process."""
    folder = tempfile.mkdtemp(prefix="phi1-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _case(op: str, shape: dict[str, Any], dtype: str, devices: tuple[str, ...] = BOTH, **fields: Any) -> Case:
    label = {letter: value for letter, value in shape.items() if letter not in ("P", "C")}
    return Case(name=named(op, label, dtype, "call"), op=op, unit="host", direction="call", shape=shape, dtype=dtype,
                devices=devices, flops="0", **fields)


def _batches() -> Case:
    """Rows of a corpus in a random order, as a step of training reads them."""
    @cache
    def corpus() -> Any:
        from phi1.train.data.corpus import open_corpus
        from phi1.train.prepare.prepare import prepare

        source = Path(sysconfig.get_path("stdlib"), "asyncio")
        prepare([str(source)], _scratch() / "corpus", val_fraction=0.05, workers=1)
        return open_corpus(_scratch() / "corpus")

    def inputs(draw: Draw) -> Inputs:
        return {"samples": draw.integers(corpus().n_samples(SEQ_LEN), BATCH).cpu()}

    def theirs(case: Case) -> Function:
        """Read the same file by PyTorch's own loader over a memory map, in this process."""
        stream = _Stream(corpus())

        def run(inputs: Inputs) -> torch.Tensor:
            loader = torch.utils.data.DataLoader(stream, batch_size=BATCH, sampler=inputs["samples"].tolist())
            return next(iter(loader))

        return run

    def exact(inputs: Inputs) -> torch.Tensor:
        whole = torch.from_numpy(corpus().rows(np.array([0]), corpus().n_tokens - 1)[0])
        return torch.stack([whole[i * SEQ_LEN : (i + 1) * SEQ_LEN + 1] for i in inputs["samples"].tolist()])

    # Read two bytes a token, write eight.
    return _case("data-loader", {"B": BATCH, "T": SEQ_LEN}, "uint16", bytes="10*B*(T + 1)", inputs=inputs, quick=True,
                 providers=(ours(lambda inputs: torch.from_numpy(corpus().rows(inputs["samples"].numpy(), SEQ_LEN))),
                            peer("DataLoader", "torch", theirs, BOTH)), reference=exact)


class _Stream(torch.utils.data.Dataset):
    """The corpus as a map-style dataset."""

    def __init__(self, corpus: Any) -> None:
        shard = corpus.shards[0]
        self.shard = np.memmap(shard.path, "<u2", "r", shard.header_bytes).view(np.ndarray)  # as its users do it
        self.count = corpus.n_samples(SEQ_LEN)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.shard[index * SEQ_LEN : (index + 1) * SEQ_LEN + 1].astype("int64"))


def _tokenise() -> Case:
    """Source files to ids, one process, many texts at once."""
    @cache
    def texts() -> tuple[str, ...]:
        folder = Path(sysconfig.get_path("stdlib"), "asyncio")
        return tuple(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))

    @cache
    def tokenizer() -> Any:
        from phi1.tokenizer import load_tokenizer

        return load_tokenizer()

    def theirs(case: Case) -> Function:
        from transformers import AutoTokenizer

        folder = _scratch() / "tokenizer"
        tokenizer().save(folder)
        fast = AutoTokenizer.from_pretrained(folder)
        return lambda inputs: _joined(fast(list(inputs["texts"]))["input_ids"])

    return _case("tokenise", {"source": "asyncio", "C": sum(len(text.encode()) for text in texts())}, "text",
                 bytes="C", inputs=lambda draw: {"texts": texts()}, quick=True,
                 providers=(ours(lambda inputs: _joined(tokenizer().encode_batch(list(inputs["texts"])))),
                            peer("transformers", "transformers", theirs, BOTH)),
                 reference=lambda inputs: theirs(None)(inputs))  # type: ignore[arg-type]


def _joined(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([token for row in rows for token in row])


@cache
def _model(config: Phi1Config) -> Any:
    """A model on the CPU; one of phi-1's size takes seconds to draw."""
    return build(config, torch.device("cpu"), torch.float16)


@cache
def _saved(config: Phi1Config) -> Path:
    from phi1.weights.huggingface import save

    folder = _scratch() / f"saved-{config.hidden_size}"
    save(_model(config), folder)
    return folder


def _on(device: torch.device, config: Phi1Config) -> Any:
    return _model(config).to(device) if device.type == "cpu" else copy.deepcopy(_model(config)).to(device)


def _load(devices: tuple[str, ...], name: str, config: Phi1Config, quick: bool) -> Case:
    """From the page cache to the device, ready to run."""
    def prepare(case: Case, on: torch.device) -> Function:
        from phi1.weights.huggingface import load

        return lambda inputs: _touched(load(_saved(config), device=on))

    def theirs(case: Case, on: torch.device) -> Function:
        from transformers import PhiForCausalLM

        from phi1.bench.peers.hf_transformers import quiet

        quiet()
        loader: Any = PhiForCausalLM
        return lambda inputs: _touched(loader.from_pretrained(_saved(config), dtype=torch.float16).to(on))

    return _parameters("load", devices, name, config, quick, lambda function, inputs: function(inputs).state_dict(),
                       ours_prepared(prepare), Provider("transformers", theirs, package="transformers"))


def _parameters(op: str, devices: tuple[str, ...], name: str, config: Phi1Config, quick: bool,
                state: Callable[[Function, Inputs], dict[str, torch.Tensor]], *providers: Provider) -> Case:
    """A case that reads or writes every parameter, of which each bit is compared."""
    return _case(op, {"model": name, "P": config.num_parameters}, "float16", devices, bytes="2*P*e", quick=quick,
                 inputs=lambda draw: {}, exclusive=op == "save" and not quick, providers=providers,
                 reference=lambda inputs: _bits(_model(config).state_dict(), config),
                 asked=lambda function, inputs: _bits(state(function, inputs), config))


def _touched(model: Any) -> Any:
    """Read an element of the model's last parameter, so that a lazy loader has loaded it."""
    list(model.parameters())[-1].flatten()[:1].float()
    return model


def _bits(state: dict[str, torch.Tensor], config: Phi1Config) -> tuple[torch.Tensor, ...]:
    """Every float16 parameter as integers, which must be equal. Ours are cut into the published tensors."""
    from phi1.weights.layouts import LAYOUTS, WRITTEN, parameter_slices

    found = parameter_slices(LAYOUTS[WRITTEN], config)
    whole = [state[place.parameter][place.index] if place.parameter in state else state[name]
             for name, place in found.items()]
    assert all(x.dtype == torch.float16 for x in whole), "not every parameter is float16"
    return tuple(x.cpu().contiguous().view(torch.int16) for x in whole)


def _written(function: Function, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The parameters that the function writes: a file of torch.save or a folder of safetensors."""
    from safetensors.torch import load_file

    path: Path = function(inputs)
    path.unlink() if path.is_file() else shutil.rmtree(path)  # so that nothing of an earlier call is read
    function(inputs)
    if path.is_file():
        return torch.load(path, weights_only=True)
    return {name: x for file in sorted(path.glob("*.safetensors")) for name, x in load_file(file).items()}


def _save(devices: tuple[str, ...], name: str, config: Phi1Config, quick: bool) -> Case:
    """To a file, replaced each time."""
    def writer(write: Callable[[Path], object], path: Path) -> Function:
        def run(inputs: Inputs) -> Path:
            write(path)
            return path

        return run

    def prepare(case: Case, on: torch.device) -> Function:
        from phi1.weights.huggingface import save

        model = _on(on, config)
        return writer(lambda folder: save(model, folder), _scratch() / f"{name}-ours")

    def theirs(case: Case, on: torch.device) -> Function:
        from phi1.bench.peers.hf_transformers import causal_model, quiet

        quiet()
        return writer(causal_model(_model(config), config).to(on).save_pretrained, _scratch() / f"{name}-theirs")

    def torch_save(case: Case, on: torch.device) -> Function:
        model = _on(on, config)
        return writer(lambda path: torch.save(model.state_dict(), path), _scratch() / f"{name}.pt")

    return _parameters("save", devices, name, config, quick, _written, ours_prepared(prepare),
                       Provider("transformers", theirs, package="transformers"), Provider("torch.save", torch_save))
