"""phi-1: a decoder of parallel blocks, each in two projections.

    x' = x + drop(attention(h)) + drop(mlp(h)),  h = layer_norm(x)          (arXiv 2306.11644, section 2.3)

Attention and MLP read the same h and add into the same residual, so q, k, v and fc1 are the rows of one input
projection and dense and fc2 the columns of one output projection:

    in_proj.weight   [3D + F, D]   rows q, k, v, fc1        in_proj.bias   [3D + F]
    out_proj.weight  [D, D + F]    columns dense, fc2       out_proj.bias  [2, D]   rows dense, fc2

B batch, T tokens, N = B * T rows, D width, H heads, K head size, F MLP width, V vocabulary, R rotary dimension.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from phi1.arguments import check_instance, check_whole, require
from phi1.cache import Cache
from phi1.config import Phi1Config
from phi1.embedding import embed
from phi1.inputs import check_ids, check_positions, check_targets, row_starts
from phi1.kernels import (
    Dropout,
    attention,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    parallel_block,
    parallel_block_decode,
    parallel_block_prefill,
    rotary,
)
from phi1.kernels.core.checks import check_device_option, check_dtype_option

ATTENTION, DENSE, FC2 = 0, 1, 2  # the kinds of dropout; each is a part of its mask's counter


class InProjection(nn.Module):
    """The weight [3D + F, D] and bias of q, k, v and fc1."""

    def __init__(self, config: Phi1Config, **factory) -> None:
        super().__init__()
        rows = 3 * config.hidden_size + config.intermediate_size
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size, **factory))
        self.bias = nn.Parameter(torch.empty(rows, **factory))


class OutProjection(nn.Module):
    """The weight [D, D + F] of dense and fc2, and their two biases [2, D]."""

    def __init__(self, config: Phi1Config, **factory) -> None:
        super().__init__()
        d = config.hidden_size
        self.weight = nn.Parameter(torch.empty(d, d + config.intermediate_size, **factory))
        self.bias = nn.Parameter(torch.empty(2, d, **factory))


class Block(nn.Module):
    """One parallel block: `forward` in training and evaluation, `prefill` and `decode` with a cache."""

    def __init__(self, config: Phi1Config, layer: int, **factory) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, **factory)
        self.in_proj = InProjection(config, **factory)
        self.out_proj = OutProjection(config, **factory)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *, batch: int, seq_starts: Tensor | None = None,
                positions: Tensor | None = None, rng: Tensor | None = None, sample_ids: Tensor | None = None,
                recompute: str = "none") -> Tensor:
        """Return x' [N, D] for x [N, D], causal within each of the `batch` sequences."""
        return parallel_block(
            x, *self._parameters_in_order(), cos, sin, n_heads=self.config.num_attention_heads, batch=batch,
            seq_starts=seq_starts, positions=positions, eps=self.config.layer_norm_eps, recompute=recompute,
            dropouts=self._dropouts(rng, sample_ids))

    def _dropouts(self, rng: Tensor | None, sample_ids: Tensor | None) -> \
            tuple[Dropout | None, Dropout | None, Dropout | None]:
        rates = (self.config.attention_dropout, self.config.residual_dropout, self.config.residual_dropout)
        if not self.training or not any(rates):
            return None, None, None
        if rng is None:
            raise ValueError("Phi1: training with dropout needs loss(..., rng=), an int64 tensor (seed, step), and "
                             f"eval() turns dropout (attention {rates[0]}, residual {rates[1]}) off; got no rng")
        attention, dense, fc2 = [
            Dropout(p, rng, sample_ids, self.layer, kind) if p else None
            for kind, p in zip((ATTENTION, DENSE, FC2), rates, strict=True)
        ]
        return attention, dense, fc2

    def _parameters_in_order(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (self.norm.weight, self.norm.bias, self.in_proj.weight, self.in_proj.bias, self.out_proj.weight,
                self.out_proj.bias)

    def prefill(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Return x' [N, D] for whole prompts x [N, D]; their keys and values go into an empty cache. No gradients."""
        batch = cache.kv.shape[2]
        x, keys, values = parallel_block_prefill(
            x, *self._parameters_in_order(), cos, sin, n_heads=self.config.num_attention_heads, batch=batch,
            seq_starts=cache.starts, positions=positions, eps=self.config.layer_norm_eps,
        )
        cache.append(self.layer, keys.unflatten(0, (batch, -1)), values.unflatten(0, (batch, -1)))
        return x

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Return x' [N, D] for the newest N / B tokens of each sequence, and append their keys and values to the cache.

        No gradients.
        """
        kv = cache.room(self.layer, x.shape[0] // cache.kv.shape[2])
        return parallel_block_decode(
            x, *self._parameters_in_order(), cos, sin, kv, seq_starts=cache.starts, positions=positions,
            eps=self.config.layer_norm_eps, check=self.layer == 0)  # the first layer's check holds for all

    def decode_with_gradients(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Compute `decode` in separate operations, which have a backward."""
        c, batch = self.config, cache.kv.shape[2]
        d, heads, tokens = c.hidden_size, c.num_attention_heads, x.shape[0] // batch
        h = layer_norm(x, self.norm.weight, self.norm.bias, c.layer_norm_eps)
        merged = linear(h, self.in_proj.weight, self.in_proj.bias)  # [N, 3D + F]
        qkv = merged[:, : 3 * d].unflatten(1, (3, heads, c.head_dim))  # [N, 3, H, K]
        q, k, v = rotary(qkv, cos, sin, positions).unflatten(0, (batch, tokens)).unbind(2)  # [B, T, H, K] each
        keys, values = cache.append(self.layer, k, v)
        att = attention(q, keys, values, seq_starts=cache.starts)
        both = torch.cat((att.reshape(-1, d), gelu(merged[:, 3 * d :])), dim=1)  # [N, D + F]
        return linear(both, self.out_proj.weight, self.out_proj.bias.sum(0), residual=x)


class Phi1(nn.Module):
    """The whole model: embedding, parallel blocks, final norm and an untied head with a bias.

    Args:
        config: shape and constants.
        device: the parameters' device; on "meta" they have no values until a loader fills them.
        dtype: the parameters' dtype. The rotary tables are always float32.

    Attributes:
        recompute: the part that the backward of each block computes again to save memory: "none", "mlp" or "block",
            as in `parallel_block`. It may change at any time, and it changes no bit.
        end_ids: ids that end a completion beside the tokenizer's own; `load` reads them from generation_config.json.

    Raises:
        TypeError: an argument has another type.
        ValueError: dtype is not of floating point, or there is no such device.
    """

    rotary_tables: Tensor
    recompute = "none"
    end_ids: tuple[int, ...] = ()

    def __init__(self, config: Phi1Config, *, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_instance("Phi1", "config", config, Phi1Config, "a phi1.Phi1Config")
        check_device_option("Phi1", device)
        check_dtype_option("Phi1", dtype)
        factory = {"device": device, "dtype": dtype}
        self.config = config
        # nn.Embedding(...) would draw values for nothing; on "meta" its first normal_ imports 900 modules in 1.4 s.
        self.embed = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.hidden_size, device=device,
                                                              dtype=dtype), freeze=False)
        self.blocks = nn.ModuleList(Block(config, layer, **factory) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, device=device, dtype=dtype)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, device="meta", dtype=dtype)
        self.head.to_empty(device=device or torch.get_default_device())
        tables = torch.empty(2, config.max_position_embeddings, config.rotary_dim // 2, device=device,
                             dtype=torch.float32)
        self.register_buffer("rotary_tables", tables, persistent=False)  # cos and sin, [2, T, R/2]
        if torch.device(device or "cpu").type != "meta":
            self.init_weights()

    def _apply(self, fn, recurse=True):
        """Move or cast the model; the rotary tables follow to a device but stay float32."""
        super()._apply(fn, recurse)
        if self.rotary_tables.dtype != torch.float32:
            self.rotary_tables = torch.empty_like(self.rotary_tables, dtype=torch.float32)
            self.init_tables()
        return self

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Draw weights from N(0, initializer_range), set biases to 0 and norms to 1 and 0, fill the rotary tables.

        Args:
            seed: seed of the values; None takes PyTorch's global generator.
        """
        if seed is not None:
            check_whole("Phi1.init_weights", seed=seed)
        generator = None if seed is None else torch.Generator(self.embed.weight.device).manual_seed(int(seed))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1)
            else:
                parameter.normal_(0, self.config.initializer_range, generator=generator)
        self.init_tables()

    @torch.no_grad()
    def init_tables(self) -> None:
        """Fill the rotary tables with cos and sin of position * theta^(-2i/R), computed in float64."""
        c, device = self.config, self.rotary_tables.device
        i = torch.arange(c.rotary_dim // 2, device=device, dtype=torch.float64)
        frequency = c.rope_theta ** (-2 * i / c.rotary_dim)
        angle = torch.outer(torch.arange(c.max_position_embeddings, device=device, dtype=torch.float64), frequency)
        self.rotary_tables.copy_(torch.stack((angle.cos(), angle.sin())))

    def forward(self, ids: Tensor, *, attention_mask: Tensor | None = None, positions: Tensor | None = None,
                cache: Cache | None = None, logits_to_keep: int = 0) -> Tensor:
        """Return the logits of the next token after each position.

        Args:
            ids: [B, T] int64 token ids.
            attention_mask: [B, T], 0 on the padding left of each prompt and 1 on its tokens. With a cache it is given
                with the prompt only; the cache remembers where each row starts.
            positions: [B, T] rotary positions; by default they count from each row's first real token.
            cache: keys and values of the tokens before these; those of the new tokens are appended.
            logits_to_keep: n computes only the logits of the last n positions; 0 computes all.

        Returns:
            [B, T or logits_to_keep, V] logits in the model's dtype. Rows of padding are meaningless.

        Raises:
            TypeError: an argument has another type.
            ValueError: an id outside the vocabulary, more tokens than the context or the cache holds, a mask that is
                not left padding, or a tensor of another shape or device.
        """
        batch, tokens = check_ids(self.config, ids, self.rotary_tables, cache)
        check_whole("Phi1", low=0, logits_to_keep=logits_to_keep)
        if positions is not None:
            check_positions(ids, positions)
        starts = row_starts(ids, attention_mask, cache)
        x = self._blocks(ids, starts, positions, cache)
        x = x.unflatten(0, (batch, tokens))[:, -logits_to_keep:] if logits_to_keep else x.unflatten(0, (batch, tokens))
        h = layer_norm(x, self.norm.weight, self.norm.bias, self.config.layer_norm_eps)
        return linear(h.flatten(0, 1), self.head.weight, self.head.bias).unflatten(0, h.shape[:2])

    def loss(self, ids: Tensor, targets: Tensor, *, reduction: str = "mean", ignore_index: int = -100,
             rng: Tensor | None = None, sample_ids: Tensor | None = None, valid_vocab: int | None = None) -> Tensor:
        """Return the cross-entropy of the targets; the logits are never all in memory.

        Args:
            ids: [B, T] int64 token ids.
            targets: [B, T] int64, the token after each position, or ignore_index.
            reduction: "mean" over the targets that count, or "sum".
            ignore_index: the value of targets that do not count.
            rng: int64 [2], (seed, step), on the model's device; needed in training with dropout.
            sample_ids: int64 [B], decides each row's dropout masks, independent of batch and rank.
            valid_vocab: the softmax leaves out ids from this one on.

        Returns:
            float32 scalar, nats.

        Raises:
            TypeError: an argument has another type, or a tensor another dtype.
            ValueError: an id or a target outside the vocabulary, a tensor of another shape or device, or a number out
                of its range.
        """
        check_ids(self.config, ids, self.rotary_tables, None)
        check_targets(ids, targets, rng, sample_ids)
        require(reduction in ("mean", "sum"), "Phi1.loss", "reduction must be mean or sum", repr(reduction))
        x = self._blocks(ids, None, None, None, rng=rng, sample_ids=sample_ids)
        h = layer_norm(x, self.norm.weight, self.norm.bias, self.config.layer_norm_eps)
        return cast(Tensor, linear_cross_entropy(  # one tensor, because return_lse is False
            h, self.head.weight, self.head.bias, targets.flatten(), reduction=reduction, ignore_index=ignore_index,
            valid_vocab=valid_vocab))

    def _blocks(self, ids: Tensor, starts: Tensor | None, positions: Tensor | None, cache: Cache | None,
                rng: Tensor | None = None, sample_ids: Tensor | None = None) -> Tensor:
        """Return the residual stream [N, D] after the last block, for ids [B, T]."""
        batch, tokens = ids.shape
        if not batch:  # no sequence at all is one without tokens
            batch, starts, positions, sample_ids, ids = 1, None, None, None, ids.new_empty(1, 0)
            tokens = 0
        cos, sin = self.rotary_tables.unbind(0)
        x = embed(self.embed.weight, ids.flatten())
        if positions is None:
            held = 0 if cache is None else cache.length
            positions = torch.arange(held, held + tokens, device=ids.device).expand(batch, tokens)
            if starts is not None:
                positions = (positions - starts[:, None]).clamp(min=0)
        flat = positions.flatten()  # one tensor, which all blocks keep for the backward
        if cache is None:
            for block in self.blocks:
                x = block(x, cos, sin, batch=batch, seq_starts=starts, positions=flat, rng=rng, sample_ids=sample_ids,
                          recompute=self.recompute)
            return x
        if torch.is_grad_enabled():
            run = Block.decode_with_gradients
        else:
            run = Block.decode if cache.length else Block.prefill
        for block in self.blocks:
            x = run(cast(Block, block), x, cos, sin, flat, cache)
        cache.length += tokens
        return x
