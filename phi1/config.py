"""The shape of a phi model: one frozen dataclass, and the published shapes by name."""

from __future__ import annotations

from dataclasses import dataclass, fields

from phi1.arguments import check_flag, check_real, is_finite, is_real, is_whole, require, shown

LARGEST = {"vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 1000,
           "max_position_embeddings": 1 << 20}
"""The largest value of a size. Beyond it the names and tables alone would fill a memory."""


@dataclass(frozen=True, kw_only=True)
class Phi1Config:
    """Shape and constants of a phi-1 family model. The defaults are phi-1's own (arXiv 2306.11644, section 2.3).

    Raises:
        ValueError: a field breaks its rule; the message names the field, the rule and the value.
    """

    vocab_size: int = 51200
    """V, rows of the embedding and of the head. phi-1's tokenizer uses 50,295 of the 51,200."""
    hidden_size: int = 2048
    """D, width of the residual stream."""
    intermediate_size: int = 8192
    """F, width of the MLP."""
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    """H. The head size K is hidden_size / num_attention_heads."""
    rotary_dim: int = 32
    """R, leading dimensions of each head that are rotated, NeoX style: i is paired with i + R/2."""
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    """Longest sequence, in tokens."""
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    """Standard deviation of the normal distribution that weights start from; biases start at 0."""
    attention_dropout: float = 0.0
    """Training only. phi-1 was trained with 0.1; its released configuration, like these defaults, says 0."""
    residual_dropout: float = 0.0
    """Training only, on each branch of the block before the residual add. phi-1 was trained with 0.1."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "max_position_embeddings"):
            self._require_whole(name)
        for name, most in LARGEST.items():
            self._require(getattr(self, name) <= most, name, f"must be at most {most:,}")
        self._require(self.hidden_size % self.num_attention_heads == 0, "hidden_size",
                      f"must be a multiple of num_attention_heads ({self.num_attention_heads})")
        self._require_whole("rotary_dim")
        self._require(self.rotary_dim % 2 == 0 and 2 <= self.rotary_dim <= self.head_dim, "rotary_dim",
                      f"must be even and between 2 and the head size ({self.head_dim})")
        for name in ("rope_theta", "layer_norm_eps", "initializer_range", "attention_dropout", "residual_dropout"):
            value = getattr(self, name)
            self._require(is_real(value), name, "must be a number")
            self._require(is_finite(value), name, "must be finite")
            if not isinstance(value, int):  # a number of NumPy has no JSON
                object.__setattr__(self, name, float(value))
        for name in ("rope_theta", "layer_norm_eps", "initializer_range"):
            self._require(getattr(self, name) > 0, name, "must be greater than 0")
        for name in ("attention_dropout", "residual_dropout"):
            self._require(0 <= getattr(self, name) < 1, name, "must be at least 0 and less than 1")

    def _require(self, holds: bool, name: str, rule: str) -> None:
        require(holds, "Phi1Config", f"{name} {rule}", shown(getattr(self, name)))

    def _require_whole(self, name: str) -> None:
        value = getattr(self, name)
        self._require(is_whole(value) and 1 <= value < 2**63, name, "must be a whole number, 1 or more")
        object.__setattr__(self, name, int(value))  # a number of NumPy has no JSON

    @property
    def head_dim(self) -> int:
        """K, size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, the head's bias included (the embedding and the head are not tied)."""
        d, f, v = self.hidden_size, self.intermediate_size, self.vocab_size
        norm = 2 * d
        block = norm + (3 * d + f) * (d + 1) + d * (d + f) + 2 * d
        return v * d + self.num_hidden_layers * block + norm + v * (d + 1)

    def flops_per_token(self, seq_len: int, *, causal: bool = False) -> float:
        """Floating-point operations of training on one token of a sequence of `seq_len`; recomputation does not count.

        They are 6 a parameter, without the input embedding, and 12 L D T for attention. Published tables count so
        (PaLM, arXiv 2204.02311, appendix B). With `causal`, attention counts half, as a causal kernel computes it.
        """
        check_real("Phi1Config.flops_per_token", seq_len=seq_len)
        check_flag("Phi1Config.flops_per_token", causal=causal)
        parameters = self.num_parameters - self.vocab_size * self.hidden_size
        attention = 12 * self.num_hidden_layers * self.hidden_size * seq_len
        return 6 * parameters + attention / (2 if causal else 1)


PRESETS: dict[str, Phi1Config] = {
    "phi1": Phi1Config(),
    "phi1-small": Phi1Config(hidden_size=1024, intermediate_size=4096, num_hidden_layers=20, num_attention_heads=16),
    # phi-1.5 has phi-1's shape and was trained on other data (arXiv 2309.05463).
    "phi1.5": Phi1Config(),
    "phi2": Phi1Config(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32),
    # Two CPU cores train it in minutes; its completions then look like Python.
    "nano": Phi1Config(vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
                       num_attention_heads=4, max_position_embeddings=512),
}


def preset(name: str, **changes: object) -> Phi1Config:
    """Return the configuration called `name`, with some fields changed.

    Args:
        name: a key of PRESETS: "phi1", "phi1-small", "phi1.5", "phi2" or "nano".
        changes: fields of Phi1Config to replace.

    Raises:
        ValueError: no such preset or field, or a value that breaks its field's rule.
    """
    require(isinstance(name, str) and name in PRESETS, "preset", f"name must be one of {', '.join(PRESETS)}",
            shown(name))
    known = {field.name for field in fields(Phi1Config)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise ValueError(f"preset: {unknown[0]!r} is not a field of Phi1Config; "
                         f"the fields are {', '.join(sorted(known))}")
    return Phi1Config(**({field: getattr(PRESETS[name], field) for field in known} | changes))  # type: ignore[arg-type]
