"""phi-1's training in plain PyTorch, in one file and without phi1: what the trainer's losses are compared with.

The model is written out matrix by matrix as in arXiv 2306.11644, section 2.3, AdamW as in arXiv 1711.05101, and the
norm of the gradient is clipped as a whole. Weights are a dictionary; their names, and the place of q, k, v and fc1 in
one matrix, are the only things that are phi1's.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Settings:
    layers: int
    heads: int
    rotary_dim: int
    steps: int
    warmup: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip: float


def rotated(x, rotary_dim):
    """x [B, H, T, K], of whose K the first rotary_dim turn with the position, i together with i + rotary_dim / 2."""
    half = rotary_dim // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(x.shape[2], dtype=torch.float64), frequency)  # [T, R/2]
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def loss_of(w, rows, settings):
    """Mean cross-entropy of rows [B, T + 1]."""
    ids, targets = rows[:, :-1], rows[:, 1:]
    batch, tokens = ids.shape
    x = w["embed.weight"][ids]  # [B, T, D]
    d = x.shape[-1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    for layer in range(settings.layers):
        p = {name: w[f"blocks.{layer}.{name}"] for name in ("norm.weight", "norm.bias", "in_proj.weight",
                                                            "in_proj.bias", "out_proj.weight", "out_proj.bias")}
        h = F.layer_norm(x, (d,), p["norm.weight"], p["norm.bias"])
        q, k, v, up = (h @ p["in_proj.weight"].T + p["in_proj.bias"]).tensor_split((d, 2 * d, 3 * d), -1)
        q, k, v = (y.view(batch, tokens, settings.heads, -1).transpose(1, 2) for y in (q, k, v))  # [B, H, T, K]
        scores = rotated(q, settings.rotary_dim) @ rotated(k, settings.rotary_dim).mT / math.sqrt(q.shape[-1])
        attention = scores.masked_fill(~causal, -math.inf).softmax(-1) @ v
        dense, fc2 = p["out_proj.weight"].tensor_split((d,), 1)
        x = (x + attention.transpose(1, 2).flatten(2) @ dense.T + p["out_proj.bias"][0]
             + F.gelu(up, approximate="tanh") @ fc2.T + p["out_proj.bias"][1])
    h = F.layer_norm(x, (d,), w["norm.weight"], w["norm.bias"])
    logits = h @ w["head.weight"].T + w["head.bias"]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train(weights, batches, settings):
    """Losses of the steps, one a batch [B, T + 1]; the weights are changed in place."""
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    beta1, beta2 = settings.betas
    losses = []
    for step, rows in enumerate(batches):
        for value in weights.values():
            value.requires_grad_()
        loss = loss_of(weights, rows, settings)
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        losses.append(loss.item())
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
        if step < settings.warmup:
            lr = settings.lr * (step + 1) / settings.warmup
        else:
            lr = settings.lr * (settings.steps - step) / (settings.steps - settings.warmup)
        with torch.no_grad():
            for name, value in weights.items():
                gradient = gradients[name] * min(1.0, settings.clip / norm)
                first[name].lerp_(gradient, 1 - beta1)
                second[name].mul_(beta2).add_(gradient.square(), alpha=1 - beta2)
                if not (name.endswith("bias") or "norm" in name):
                    value.mul_(1 - lr * settings.weight_decay)
                mean = first[name] / (1 - beta1 ** (step + 1))
                spread = (second[name] / (1 - beta2 ** (step + 1))).sqrt()
                value.sub_(lr * mean / (spread + settings.eps))
    return losses
