"""The operations of phi-1, as Triton kernels where there is one and as PyTorch code everywhere."""

from phi1.kernels._backend import backend

__all__ = ["backend"]
