"""The configuration of a run: one typed, frozen object from a TOML file and `--section.key value` on the command line.

Every key has a default, a rule and a line of documentation, all in the classes below; `--help` prints them. The
defaults are the `nano` run, which `train/configs/nano.toml` spells out.
"""

from __future__ import annotations

import difflib
import json
import tomllib
import types
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tomli_w
from pydantic import Field, TypeAdapter, ValidationError

from phi1.config import PRESETS, Phi1Config, preset
from phi1.train.launch import RunError

DEFAULT_FILE = Path(__file__).parent / "configs" / "nano.toml"
SHOWN_PATH = "train/configs/nano.toml"

Count = Annotated[int, Field(ge=1, le=2**40)]
CountOrZero = Annotated[int, Field(ge=0, le=2**40)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Folder = Annotated[str, Field(min_length=1)]


def doc(text: str) -> Any:
    return Field(description=text)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model's shape: a preset, and changes to it."""

    preset: Annotated[str, doc(f"one of {', '.join(PRESETS)}")] = "nano"
    init: Annotated[str | None, doc("weights to start from: a folder or Hub id, of this shape (unset: random)")] = None
    vocab_size: Annotated[Count | None, doc("V, at least the tokenizer's number of ids (unset: the preset's)")] = None
    hidden_size: Annotated[Count | None, doc("D (unset: the preset's)")] = None
    intermediate_size: Annotated[Count | None, doc("F (unset: the preset's)")] = None
    num_hidden_layers: Annotated[Count | None, doc("layers (unset: the preset's)")] = None
    num_attention_heads: Annotated[Count | None, doc("H (unset: the preset's)")] = None
    rotary_dim: Annotated[Count | None, doc("R (unset: the preset's)")] = None
    max_position_embeddings: Annotated[Count | None, doc("context in tokens (unset: the preset's)")] = None


@dataclass(frozen=True, kw_only=True)
class Data:
    """The corpus. A folder that is not there is prepared from the source first."""

    folder: Annotated[Folder, doc("prepared corpus: shards, index and tokenizer")] = "data/python-stdlib"
    source: Annotated[str, doc("what to prepare: stdlib (the interpreter's own library), or a folder of .py files")] \
        = "stdlib"
    tokenizer: Annotated[str, doc("train (a BPE on the source), a folder, or a Hub id")] = "train"
    vocab_size: Annotated[Count, doc("size of the BPE, where tokenizer is train")] = 4096
    seq_len: Annotated[Count, doc("T, tokens in a training sequence")] = 256
    workers: Annotated[CountOrZero, doc("processes that tokenise (0: one a core); does not change the result")] = 0


@dataclass(frozen=True, kw_only=True)
class Train:
    """The optimization."""

    steps: Annotated[Count, doc("optimizer steps of the run")] = 1250
    schedule_steps: Annotated[CountOrZero, doc("steps over which the rate falls to min_lr (0: steps)")] = 0
    batch_size: Annotated[Count, doc("sequences in a step, over all processes")] = 4
    micro_batch_size: Annotated[CountOrZero, doc("sequences in one forward pass of one process (0: as many as "
                                                 "batch_size allows)")] = 0
    lr: Annotated[Positive, doc("peak learning rate")] = 3e-3
    min_lr: Annotated[NotNegative, doc("learning rate at the end of the schedule")] = 0.0
    warmup_steps: Annotated[CountOrZero, doc("steps of linear warmup")] = 100
    weight_decay: Annotated[NotNegative, doc("on matrices, embedding and head included; not on biases and "
                                                    "norms")] = 0.1
    betas: Annotated[tuple[Fraction, Fraction], doc("AdamW's")] = (0.9, 0.95)
    eps: Annotated[Positive, doc("AdamW's")] = 1e-8
    clip: Annotated[NotNegative, doc("largest global norm of the gradient (0: no clipping)")] = 1.0
    dropout: Annotated[Fraction, doc("on attention and on both residual branches")] = 0.0
    precision: Annotated[Literal["auto", "fp16", "bf16", "fp32"],
                         doc("of the arithmetic; weights and optimizer are fp32. auto: fp16 on CUDA; on CPU bf16 "
                             "where the processor has it, else fp32")] = "auto"
    activations: Annotated[Literal["none", "recompute-mlp", "block"],
                           doc("what a layer's backward computes again to save memory: none, recompute-mlp (the MLP's "
                               "pre-activation), or block (all but its input); changes no bit")] = "none"
    loss_scale: Annotated[Positive, doc("fp16: first loss scale")] = 65536.0
    loss_scale_window: Annotated[Count, doc("fp16: steps without overflow before the scale doubles")] = 2000
    loss_scale_hysteresis: Annotated[Count, doc("fp16: which overflow since the scale last doubled is the first to "
                                                "halve it")] = 2
    loss_scale_floor: Annotated[Positive, doc("fp16: the scale does not fall below this")] = 1.0
    max_skips: Annotated[Count, doc("steps in a row whose gradient is not finite, after which the run stops")] = 20
    seed: Annotated[int, Field(ge=0, lt=2**32), doc("of initial weights, sample order and dropout")] = 1
    threads: Annotated[CountOrZero, doc("CPU threads of each process (0: cores / processes of this machine)")] = 0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save, and where to go on from."""

    every: Annotated[CountOrZero, doc("steps between checkpoints (0: at the end only)")] = 500
    keep: Annotated[Count, doc("newest checkpoints to keep")] = 2
    keep_every: Annotated[CountOrZero, doc("also keep checkpoints whose step is a multiple of this (0: none)")] = 0
    best: Annotated[Literal["validation", "humaneval"] | None,
                    doc("also keep the checkpoint with the lowest validation loss, or with the highest pass@1 on "
                        "HumanEval, and export that one (unset: the last one)")] = None
    resume: Annotated[str, doc("auto (the newest that is whole), or a checkpoint's name such as step-500; later ones "
                               "are removed")] = "auto"


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Validation on held-out documents."""

    every: Annotated[CountOrZero, doc("steps between evaluations (0: at the end only)")] = 0
    sequences: Annotated[CountOrZero, doc("held-out sequences, the same ones each time (0: all)")] = 512
    completions: Annotated[CountOrZero, doc("function headers of the held-out text to complete")] = 3
    completions_every: Annotated[CountOrZero, doc("steps between completions of the same headers, each time a file in "
                                                  "samples/ (0: at the end only)")] = 0
    humaneval: Annotated[str | None, doc("JSON lines of HumanEval's problems, to be solved at each checkpoint and at "
                                         "the end (unset: none)")] = None
    execute: Annotated[bool, doc("consent to run, on this machine, what the model writes for them")] = False
    timeout: Annotated[Positive, doc("seconds that one of its programs may run")] = 3.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where and on what."""

    folder: Annotated[Folder, doc("the run's folder")] = "runs/nano"
    device: Annotated[Literal["auto", "cpu", "cuda"], doc("auto: cuda where there is one")] = "auto"
    shard_group: Annotated[CountOrZero, doc("processes that share out one copy of the states; other groups hold "
                                            "replicas (0: those of one machine)")] = 0
    reshard: Annotated[bool, doc("give up gathered parameters after each pass of a block and reduce gradients after "
                                 "each micro-step: the least memory, for small cards, and more communication")] = False
    watchdog: Annotated[NotNegative, doc("seconds that a step, a save or a batch of an evaluation may take before its "
                                         "process ends with its stack (0: any)")] = 1800.0
    profile: Annotated[str, doc("steps to trace, such as 7 or 7-9: a Chrome trace in the run's folder and a short "
                                "table (unset: none); also --profile")] = ""
    tensorboard: Annotated[bool, doc("also write TensorBoard's files, if it is installed")] = True
    wandb: Annotated[bool, doc("also log to Weights & Biases; WANDB_MODE=offline keeps it on this machine")] = False
    time_limit: Annotated[NotNegative, doc("minutes after the launch at which the run saves and stops (0: none)")] = 0.0
    bitwise: Annotated[bool, doc("refuse to go on where the rest would not have the same bits: another number of "
                                 "processes or threads, other hardware, versions or precision; also --bitwise")] = False
    prove_resume: Annotated[CountOrZero, doc("train nothing: run the last so many steps again, from a checkpoint, and "
                                             "compare all bits; also --prove-resume K (0: train)")] = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that defines a run."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)
    run: Run = field(default_factory=Run)

    def phi1_config(self) -> Phi1Config:
        """The model's configuration. Raises RunError for a value that breaks its rule."""
        changes = {key: value for key, value in asdict(self.model).items()
                   if key not in ("preset", "init") and value is not None}
        try:
            return preset(self.model.preset, **changes, attention_dropout=self.train.dropout,
                          residual_dropout=self.train.dropout)
        except ValueError as error:
            raise RunError(f"[model] {error}") from None

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """section -> key -> value, as JSON and TOML have them; keys that are unset are left out."""
        return {name: {key: list(value) if isinstance(value, tuple) else value
                       for key, value in section.items() if value is not None}
                for name, section in asdict(self).items()}

    def to_toml(self) -> str:
        """The same recipe as a file."""
        return tomli_w.dumps(self.as_dict())


def _section_fields() -> dict[str, Any]:
    """Every `section.key` with its annotation, without the surrounding documentation."""
    return {f"{section.name}.{key}": hint
            for section in fields(Recipe)
            for key, hint in get_type_hints(section.default_factory, include_extras=True).items()}  # type: ignore[arg-type]


KEYS = _section_fields()
ACTIVATIONS = get_args(get_args(KEYS["train.activations"])[0])  # each keeps less than the one before
_ADAPTER = TypeAdapter(Recipe)


def read_recipe(file: Path | None, overrides: dict[str, str], shown: str | None = None) -> Recipe:
    """The recipe in `file` (the nano run's if None) with the command line's values in place of the file's.

    Args:
        file: a TOML file; unset keys take the defaults above.
        overrides: `section.key` -> the text given on the command line.
        shown: how error messages call the file, if not by its path.

    Raises:
        RunError: no such file, bad TOML, an unknown key or a value that breaks its rule; one line names it.
    """
    name = shown or (SHOWN_PATH if file is None else str(file))
    data = _read_toml(file or DEFAULT_FILE, name)
    flat: dict[str, Any] = {}
    for section, content in data.items():
        if not isinstance(content, dict):
            if section in {known.name for known in fields(Recipe)}:
                raise RunError(f"{name}: {section} must be a section, a line [{section}] with the keys below it; got "
                               f"{content!r}")
            raise RunError(f"{name}: {_unknown(section)}")
        flat |= {f"{section}.{key}": value for key, value in content.items()}
    for key in flat:
        if key not in KEYS:
            raise RunError(f"{name}: {_unknown(key)}")
    for key, text in overrides.items():
        if key not in KEYS:
            raise RunError(_unknown(key))
        flat[key] = _from_text(key, text)
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, leaf = key.split(".", 1)
        sections.setdefault(section, {})[leaf] = value
    return _validated(sections, overrides, name)


def _read_toml(file: Path, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"--config {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RunError(f"--config {name}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"--config {name}: not valid TOML: {error}") from None


def _unknown(key: str) -> str:
    """Say that the key is unknown, with the known one that is nearest, by its whole name or by its last part."""
    leaf = key.rsplit(".", 1)[-1]

    def likeness(known: str) -> float:
        same_section = "." in key and key.split(".")[0] == known.split(".")[0]
        return max(difflib.SequenceMatcher(None, key, known).ratio(),
                   difflib.SequenceMatcher(None, leaf, known.split(".")[1]).ratio() - (0 if same_section else 0.05))

    return f"{key!r} is not a key; the nearest is {max(KEYS, key=likeness)} (--help lists them all)"


def _from_text(key: str, text: str) -> Any:
    """A command line's text as the TOML value that the key wants; texts need no quotes."""
    if _is_text(KEYS[key]):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _is_text(hint: Any) -> bool:
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is types.UnionType:
        return any(_is_text(part) for part in get_args(hint))
    return hint is str or get_origin(hint) is Literal


def _validated(sections: dict[str, dict[str, Any]], overrides: dict[str, str], name: str) -> Recipe:
    try:
        # Through JSON, since strict validation of Python objects would want tuples and finished dataclasses.
        return _ADAPTER.validate_json(json.dumps(sections, default=str), strict=True)
    except ValidationError as failure:
        error = failure.errors(include_url=False)[0]
        section, leaf, *index = error["loc"]
        key = f"{section}.{leaf}"
        shown = key + "".join(f"[{i}]" for i in index if isinstance(i, int))
        where = "" if key in overrides else f"{name}: "
        raise RunError(f"{where}{shown}: {_rule(error, key)}; got {sections[str(section)][str(leaf)]!r}") from None


def _rule(error: Any, key: str) -> str:
    """What a value must be: pydantic's words, or ours where they do not say what to write."""
    if error["type"].startswith("bool_"):
        return "input should be true or false"
    if error["type"] in ("tuple_type", "missing", "too_long"):
        section, leaf = key.split(".")
        return f"input should be of the form {json.dumps(getattr(getattr(Recipe(), section), leaf))}"
    return error["msg"][0].lower() + error["msg"][1:]


def help_text() -> str:
    """Every key with its default and its line of documentation."""
    lines = []
    for section in fields(Recipe):
        cls = section.default_factory
        lines += ["", f"[{section.name}]  {cls.__doc__}"]  # type: ignore[union-attr]
        for item in fields(cls):  # type: ignore[arg-type]
            notes = [note.description for note in KEYS[f"{section.name}.{item.name}"].__metadata__
                     if getattr(note, "description", None)]
            default = "" if item.default is None else f" (default {json.dumps(item.default)})"
            lines.append(f"  --{section.name}.{item.name}  {notes[-1]}{default}")
    return "\n".join(lines).lstrip("\n")
