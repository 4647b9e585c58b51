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

from phi1.cache import Cache
from phi1.config import Phi1Config
from phi1.embedding import embed
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

ATTENTION, DENSE, FC2 = 0, 1, 2  # the kinds of dropout, part of the masks' counter


class InProjection(nn.Module):
    """Weight and bias of q, k, v and fc1 in one matrix, [3D + F, D]."""

    def __init__(self, config: Phi1Config, **factory) -> None:
        super().__init__()
        rows = 3 * config.hidden_size + config.intermediate_size
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size, **factory))
        self.bias = nn.Parameter(torch.empty(rows, **factory))


class OutProjection(nn.Module):
    """Weight and biases of dense and fc2 in one matrix, [D, D + F]; the two biases apart, [2, D]."""

    def __init__(self, config: Phi1Config, **factory) -> None:
        super().__init__()
        d = config.hidden_size
        self.weight = nn.Parameter(torch.empty(d, d + config.intermediate_size, **factory))
        self.bias = nn.Parameter(torch.empty(2, d, **factory))


class Block(nn.Module):
    """One parallel block: `forward` in training and evaluation; with a cache `prefill`, then `decode`."""

    def __init__(self, config: Phi1Config, layer: int, **factory) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps, **factory)
        self.in_proj = InProjection(config, **factory)
        self.out_proj = OutProjection(config, **factory)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, *, batch: int, seq_starts: Tensor | None = None,
                positions: Tensor | None = None, rng: Tensor | None = None, sample_ids: Tensor | None = None,
                recompute: str = "none") -> Tensor:
        """x [N, D] -> x' [N, D], causal within each of the `batch` sequences."""
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
        """x [N, D] of whole prompts -> x' [N, D]; their keys and values are the first of the cache. No gradients."""
        batch = cache.kv.shape[2]
        x, keys, values = parallel_block_prefill(
            x, *self._parameters_in_order(), cos, sin, n_heads=self.config.num_attention_heads, batch=batch,
            seq_starts=cache.starts, positions=positions, eps=self.config.layer_norm_eps,
        )
        cache.append(self.layer, keys.unflatten(0, (batch, -1)), values.unflatten(0, (batch, -1)))
        return x

    def decode(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """x [N, D] of the newest N / B tokens of each sequence -> x' [N, D]; their keys and values join the cache. No
        gradients."""
        kv = cache.room(self.layer, x.shape[0] // cache.kv.shape[2])
        return parallel_block_decode(
            x, *self._parameters_in_order(), cos, sin, kv, seq_starts=cache.starts, positions=positions,
            eps=self.config.layer_norm_eps, check=self.layer == 0)  # the first layer's check holds for all

    def decode_with_gradients(self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """`decode` step by step, in operations that have a backward."""
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
        device: where the parameters lie; on "meta" they are left without values, for a loader to fill.
        dtype: of the parameters. Rotary tables are float32 whatever it is.

    Attributes:
        recompute: what the backward of each block computes again to save memory: "none", "mlp" or "block", as for
            `parallel_block`. It may change at any time, and changes no bit.
    """

    rotary_tables: Tensor
    recompute = "none"

    def __init__(self, config: Phi1Config, *, device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        # nn.Embedding(...) would draw values to discard; on "meta" its first normal_ imports 900 modules in 1.4 s.
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
            seed: makes the values a function of the seed alone; None takes PyTorch's global generator.
        """
        generator = None if seed is None else torch.Generator(self.embed.weight.device).manual_seed(seed)
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
        """Fill the rotary tables: cos and sin of position * theta^(-2i/R), computed in float64, kept in float32."""
        c, device = self.config, self.rotary_tables.device
        i = torch.arange(c.rotary_dim // 2, device=device, dtype=torch.float64)
        frequency = c.rope_theta ** (-2 * i / c.rotary_dim)
        angle = torch.outer(torch.arange(c.max_position_embeddings, device=device, dtype=torch.float64), frequency)
        self.rotary_tables.copy_(torch.stack((angle.cos(), angle.sin())))

    def forward(self, ids: Tensor, *, attention_mask: Tensor | None = None, positions: Tensor | None = None,
                cache: Cache | None = None, logits_to_keep: int = 0) -> Tensor:
        """Logits of the next token after each position.

        Args:
            ids: [B, T] int64 token ids.
            attention_mask: [B, T], 0 on the padding left of each prompt and 1 on its tokens. With a cache it is given
                with the prompt alone; the cache remembers where each row starts.
            positions: [B, T] rotary positions; by default they count from each row's first real token.
            cache: the tokens before these; it takes these in as well.
            logits_to_keep: n computes the logits of the last n positions alone; 0 those of all.

        Returns:
            [B, T or logits_to_keep, V] logits in the model's dtype. Rows of padding are meaningless.

        Raises:
            ValueError: an id outside the vocabulary, more tokens than the context or the cache holds, or a mask that
                is not left padding.
        """
        batch, tokens = self._check_ids(ids, cache)
        if logits_to_keep < 0:
            raise ValueError(f"Phi1: logits_to_keep must be at least 0; got {logits_to_keep}")
        starts = self._starts(ids, attention_mask, cache)
        x = self._blocks(ids, starts, positions, cache)
        x = x.unflatten(0, (batch, tokens))[:, -logits_to_keep:] if logits_to_keep else x.unflatten(0, (batch, tokens))
        h = layer_norm(x, self.norm.weight, self.norm.bias, self.config.layer_norm_eps)
        return linear(h.flatten(0, 1), self.head.weight, self.head.bias).unflatten(0, (batch, -1))

    def loss(self, ids: Tensor, targets: Tensor, *, reduction: str = "mean", ignore_index: int = -100,
             rng: Tensor | None = None, sample_ids: Tensor | None = None, valid_vocab: int | None = None) -> Tensor:
        """Cross-entropy of the targets, without ever holding all the logits.

        Args:
            ids: [B, T] int64 token ids.
            targets: [B, T] int64, the token that follows each position, or ignore_index.
            reduction: "mean" over the targets that count, or "sum".
            ignore_index: the target value that does not count.
            rng: int64 [2], (seed, step), on the model's device; needed in training with dropout.
            sample_ids: int64 [B], names each row in the dropout masks, whatever batch or rank it is in.
            valid_vocab: ids from this one on are left out of the softmax.

        Returns:
            float32 scalar, nats.
        """
        self._check_ids(ids, None)
        if targets.shape != ids.shape:
            raise ValueError(f"Phi1.loss: targets.shape must be ids.shape {tuple(ids.shape)}; "
                             f"got {tuple(targets.shape)}")
        x = self._blocks(ids, None, None, None, rng=rng, sample_ids=sample_ids)
        h = layer_norm(x, self.norm.weight, self.norm.bias, self.config.layer_norm_eps)
        return cast(Tensor, linear_cross_entropy(  # alone, as return_lse is not asked for
            h, self.head.weight, self.head.bias, targets.flatten(), reduction=reduction, ignore_index=ignore_index,
            valid_vocab=valid_vocab))

    def _blocks(self, ids: Tensor, starts: Tensor | None, positions: Tensor | None, cache: Cache | None,
                rng: Tensor | None = None, sample_ids: Tensor | None = None) -> Tensor:
        """[B, T] ids -> [N, D], the residual stream after the last block."""
        batch, tokens = ids.shape
        cos, sin = self.rotary_tables.unbind(0)
        x = embed(self.embed.weight, ids.flatten())
        if positions is None:
            held = 0 if cache is None else cache.length
            positions = torch.arange(held, held + tokens, device=ids.device).expand(batch, tokens)
            if starts is not None:
                positions = (positions - starts[:, None]).clamp(min=0)
        flat = positions.flatten()  # one for all blocks, which keep it for the backward
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

    def _check_ids(self, ids: Tensor, cache: Cache | None) -> tuple[int, int]:
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise ValueError(f"Phi1: ids must be int64 [B, T]; got {ids.dtype} {list(ids.shape)}")
        batch, tokens = ids.shape
        limit = self.config.max_position_embeddings
        held = 0 if cache is None else cache.length
        if held + tokens > limit:
            raise ValueError(f"Phi1: at most {limit} tokens fit the model's context; got {held + tokens}")
        if cache is not None and held + tokens > cache.max_length:
            raise ValueError(f"Phi1: at most {cache.max_length} tokens fit the cache; got {held + tokens}")
        if cache is not None and cache.kv.shape[2] != batch:
            raise ValueError(f"Phi1: ids must have the cache's batch, {cache.kv.shape[2]}; got {batch}")
        # On CUDA this check would wait for the device; there the embedding itself asserts.
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(f"Phi1: token ids must be between 0 and {self.config.vocab_size - 1}; "
                                 f"got {low if low < 0 else high}")
        return batch, tokens

    @staticmethod
    def _starts(ids: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor | None:
        """First real token of each row, int32 [B], or None where no row is padded."""
        if cache is not None and not cache.length:
            cache.starts = None  # of a prompt that was cropped away
        if mask is None:
            return None if cache is None else cache.starts
        if mask.shape != ids.shape:
            raise ValueError(f"Phi1: attention_mask.shape must be ids.shape {tuple(ids.shape)}; "
                             f"got {tuple(mask.shape)}")
        if cache is not None and cache.length:
            raise ValueError("Phi1: attention_mask goes with the prompt, into an empty cache; "
                             f"this cache holds {cache.length} tokens")
        mask = mask.bool()
        starts = (~mask).sum(1, dtype=torch.int32)
        if not torch.compiler.is_compiling() and not bool((mask[:, 1:] >= mask[:, :-1]).all()):
            raise ValueError("Phi1: attention_mask must be left padding, zeros then ones in each row")
        if cache is not None:
            cache.starts = starts
        return starts
