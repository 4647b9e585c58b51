"""Constants that several Triton kernels read."""

import triton.language as tl

from phi1.kernels.core import constants

LOG2E = tl.constexpr(constants.LOG2E)
LOWEST = tl.constexpr(constants.LOWEST)
