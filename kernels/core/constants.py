"""Numbers that PyTorch code and Triton kernels share. Kernels read them as `tl.constexpr`."""

import math

LOG2E = math.log2(math.e)
# The maximum of no scores, in place of -inf, because -inf less itself is NaN. Its product with LOG2E is finite in
# float32. No score may be lower.
LOWEST = -2e38

# gelu_new(x) = x sigmoid(GELU_LINEAR x + GELU_CUBIC x^3)
GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = GELU_LINEAR * 0.044715

# Every launch passes it, because its default changes with Triton 3.10 and would change the bits of the results.
FP_FUSION = True
