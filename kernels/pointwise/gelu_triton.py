"""gelu_new inside Triton kernels, alone and with its derivative for one exponential; formulas in `gelu.py`.

Arguments and results are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from phi1.kernels.core import constants

LINEAR = tl.constexpr(constants.GELU_LINEAR)
CUBIC = tl.constexpr(constants.GELU_CUBIC)
SLOPE_SQUARE = tl.constexpr(3 * constants.GELU_CUBIC)


@triton.jit
def gelu_new(x):
    """y = x s(x)."""
    return x * tl.sigmoid(x * (x * x * CUBIC + LINEAR))


@triton.jit
def gelu_new_and_slope(x):
    """(y, y')."""
    square = x * x
    s = tl.sigmoid(x * (square * CUBIC + LINEAR))
    y = x * s
    return y, s + y * (1.0 - s) * (square * SLOPE_SQUARE + LINEAR)
