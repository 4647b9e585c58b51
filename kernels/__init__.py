"""The operations of phi-1, as Triton kernels where there is one and as PyTorch code everywhere."""

from phi1.kernels._backend import backend
from phi1.kernels._checks import check_values
from phi1.kernels._philox import Dropout

__all__ = ["Dropout", "backend", "check_values"]
