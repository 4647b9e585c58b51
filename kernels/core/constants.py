"""Numbers that PyTorch code and Triton kernels share; a kernel's file makes a `tl.constexpr` of those it reads."""

import math

LOG2E = math.log2(math.e)

# gelu_new(x) = x sigmoid(GELU_LINEAR x + GELU_CUBIC x^3)
GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = GELU_LINEAR * 0.044715

# Every launch passes it: the default changes with Triton 3.10, and the bits of the results with it.
FP_FUSION = True
