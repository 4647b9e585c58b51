"""The configuration of a run: one typed, frozen object. `file.py` reads it, and pydantic enforces the rules.

Every key has a default, a rule and a line of documentation, all in the classes below; `--help` prints them. The
defaults are the `nano` run, which `train/configs/nano.toml` spells out. The default of a new key is the trainer's
behaviour before the key existed, since older recipes and checkpoints take it. The classes themselves need no package:
a training step with a `Train` works without pydantic and tomli_w.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal, get_args, get_type_hints

from phi1.config import PRESETS, Phi1Config, preset
from phi1.train.runtime.launch import RunError


class Field:
    """An annotation of a key: the limits of its values, by pydantic's names, or its line of documentation."""

    def __init__(self, description: str = "", **limits: Any) -> None:
        self.description, self.limits = description, limits

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        import pydantic

        return handler.generate_schema(Annotated[source, pydantic.Field(**self.limits)]) if self.limits \
            else handler(source)


LORA = ("lora_rank", "lora_alpha")
"""Keys of [model] that are no part of its shape."""
Count = Annotated[int, Field(ge=1, le=2**40)]
CountOrZero = Annotated[int, Field(ge=0, le=2**40)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Folder = Annotated[str, Field(min_length=1)]
doc = Field


@dataclass(frozen=True, kw_only=True)
class Model:
    """The model's shape: a preset, and changes to it."""

    preset: Annotated[str, doc(f"one of {', '.join(PRESETS)}")] = "nano"
    init: Annotated[str | None, doc("weights to start from: a folder or Hub id, of this shape (unset: random)")] = None
    lora_rank: Annotated[CountOrZero, doc("rank of adapters on every projection of the blocks, which alone are trained "
                                          "(0: all parameters are)")] = 0
    lora_alpha: Annotated[Positive, doc("the adapters' updates are multiplied by lora_alpha / lora_rank")] = 16.0
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
    loss_scale_hysteresis: Annotated[Count, doc("fp16: overflows until the scale halves, counted since it last "
                                                "doubled")] = 2
    loss_scale_floor: Annotated[Positive, doc("fp16: the scale does not fall below this")] = 1.0
    max_skips: Annotated[Count, doc("skipped steps in a row after which the run stops")] = 20
    max_loss_jump: Annotated[NotNegative, doc("skip a step whose loss is more than this times the running mean of the "
                                              "last 50 or so (0: never)")] = 0.0
    find_nonfinite: Annotated[bool, doc("compute a step whose gradient is not finite again, and name the first tensor "
                                        "that is not")] = False
    seed: Annotated[int, Field(ge=0, lt=2**32), doc("of initial weights, sample order and dropout")] = 1
    threads: Annotated[CountOrZero, doc("CPU threads of each process (0: this machine's cores / processes)")] = 0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Saving, and the checkpoint to resume from."""

    every: Annotated[CountOrZero, doc("steps between checkpoints (0: at the end only)")] = 500
    keep: Annotated[Count, doc("newest checkpoints to keep")] = 2
    keep_every: Annotated[CountOrZero, doc("also keep checkpoints whose step is a multiple of this (0: none)")] = 0
    best: Annotated[Literal["validation", "humaneval"] | None,
                    doc("also keep the checkpoint with the lowest validation loss, or with the highest pass@1 on "
                        "HumanEval, and export that one (unset: the last one)")] = None
    resume: Annotated[str, doc("auto (the newest that is whole), or once a checkpoint's name such as step-500; later "
                               "ones are removed")] = "auto"


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
    """The run's folder, its machine, and its limits."""

    folder: Annotated[Folder, doc("the run's folder")] = "runs/nano"
    device: Annotated[Literal["auto", "cpu", "cuda"], doc("auto: cuda where there is one")] = "auto"
    shard_group: Annotated[CountOrZero, doc("processes that share one copy of the states; other groups hold "
                                            "replicas (0: those of one machine)")] = 0
    reshard: Annotated[bool, doc("free gathered parameters after each pass of a large block and reduce gradients "
                                 "after each micro-step: the least memory, for small cards, and more "
                                 "communication; no effect with one process on a CPU")] = False
    watchdog: Annotated[NotNegative, doc("seconds that the start with its loading, a step, a save, a batch of an "
                                         "evaluation or the gathering of the weights may take before its process ends "
                                         "and prints its stack; time while the run is suspended does not count (0: "
                                         "no limit)")] = 1800.0
    profile: Annotated[str, doc("steps to trace, such as 7 or 7-9: a Chrome trace in the run's folder and a short "
                                "table (unset: none); also --profile")] = ""
    tensorboard: Annotated[bool, doc("also write TensorBoard's files, if it is installed")] = True
    wandb: Annotated[bool, doc("also log to Weights & Biases; WANDB_MODE=offline keeps it on this machine")] = False
    time_limit: Annotated[NotNegative, doc("minutes after the launch at which the run saves and stops (0: none)")] = 0.0
    bitwise: Annotated[bool, doc("refuse to resume if the rest would not have the same bits: another number of "
                                 "processes or threads, other hardware, versions or precision; also --bitwise")] = False
    change: Annotated[str, doc("keys that a resumed run takes otherwise than before, such as "
                               "train.lr=1e-4,train.clip=0.5: train.lr, min_lr, clip, loss_scale_window, "
                               "loss_scale_hysteresis or loss_scale_floor (unset: none)")] = ""
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
        """Return the model's configuration. Raises RunError for a value that breaks its rule."""
        changes = {key: value for key, value in asdict(self.model).items()
                   if key not in ("preset", "init", *LORA) and value is not None}
        try:
            return preset(self.model.preset, **changes, attention_dropout=self.train.dropout,
                          residual_dropout=self.train.dropout)
        except ValueError as error:
            raise RunError(f"[model] {error}") from None

    def adapters(self) -> int:
        """Return the number of parameters of the adapters, which alone are trained; 0 if there are none."""
        config = self.phi1_config()
        ends = 10 * config.hidden_size + 2 * config.intermediate_size  # inputs and outputs of a block's projections
        return self.model.lora_rank * config.num_hidden_layers * ends

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return section -> key -> value, with the types of JSON and TOML; unset keys are left out."""
        return {name: {key: list(value) if isinstance(value, tuple) else value
                       for key, value in section.items() if value is not None}
                for name, section in asdict(self).items()}

    def to_toml(self) -> str:
        """Return the recipe as the text of a file."""
        import tomli_w

        return tomli_w.dumps(self.as_dict())


CHANGEABLE = tuple(f"train.{key}" for key in ("lr", "min_lr", "clip", "loss_scale_window",
                                              "loss_scale_hysteresis", "loss_scale_floor"))
"""Keys that define a run, and that run.change may change as it resumes."""


def changes(text: str) -> dict[str, str]:
    """Return key -> text of a value of run.change. Raises RunError for what it cannot hold."""
    found = {}
    for item in filter(None, text.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in CHANGEABLE or not equals:
            raise RunError(f"run.change must be KEY=VALUE, or several with commas, with a KEY of "
                           f"{', '.join(CHANGEABLE)}; got {item!r}")
        found[key] = value
    return found


KEYS = {f"{section.name}.{key}": hint
        for section in fields(Recipe)
        for key, hint in get_type_hints(section.default_factory, include_extras=True).items()}  # type: ignore[arg-type]
"""Every `section.key` with its annotation."""
ACTIVATIONS = get_args(get_args(KEYS["train.activations"])[0])
"""The modes, each of which keeps less than the one before."""
