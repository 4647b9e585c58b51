"""gelu_new inside Triton kernels: the function, and its derivative with it for one exponential; formulas in `_gelu.py`.

Arguments and results are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from phi1.kernels.pointwise import gelu_eager

LINEAR = tl.constexpr(gelu_eager.LINEAR)
CUBIC = tl.constexpr(gelu_eager.CUBIC)
SLOPE_SQUARE = tl.constexpr(3 * gelu_eager.CUBIC)


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
