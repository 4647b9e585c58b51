"""What training steps take of a GPU's memory: at most in all, and at most for the activations of a micro-step.

Held for activations is what is there beyond what a micro-step begins with, which are parameters, Adam's states and the
gradients of the micro-steps before: what is kept for the backward (`activations` of `train/plan.py`) and, for a moment,
what the loss and the backward of the last block need beside it. From there on blocks free more than they add. Of a
step's first micro-step gradients are made in this time and count as well, so that a step should have two or more.
"""

from __future__ import annotations

from typing import Any

import torch

from phi1 import Phi1


class StepMemory:
    """Watches a model's training steps. All in bytes.

    Args:
        model: on a GPU.
        cuda: torch.cuda, or what stands in for it in a test.

    Attributes:
        activations: most that the activations of the newest micro-step held.
    """

    def __init__(self, model: Phi1, cuda: Any = torch.cuda) -> None:
        self.cuda, self.activations = cuda, 0
        self._most = self._before = 0
        model.blocks[0].register_forward_pre_hook(self._begin)
        model.blocks[-1].register_forward_pre_hook(self._watch_backward)

    def take_peak(self) -> int:
        """Most that tensors have held since the last call."""
        most = max(self._most, self.cuda.max_memory_allocated())
        self.cuda.reset_peak_memory_stats()
        self._most = 0
        return most

    def _begin(self, block: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0]  # the first activation
        self._before = self.cuda.memory_allocated() - x.numel() * x.element_size()
        self._most = self.take_peak()

    def _watch_backward(self, block: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        if arguments[0].requires_grad:
            arguments[0].register_hook(self._end)  # called with its gradient, the last thing that the block makes

    def _end(self, gradient: torch.Tensor) -> None:
        self.activations = self.cuda.max_memory_allocated() - self._before
