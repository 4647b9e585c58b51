"""The operations of phi-1, as Triton kernels where there is one and as PyTorch code everywhere.

An operation `op` is two files, so that importing this package imports no Triton:

    op.py           the public function, its reference, the PyTorch path and the torch.library registration
    _op_triton.py   the Triton kernels and their launchers; imported only inside the branch of op.py that launches them

`_backend.py` decides which of them runs, `_checks.py` has the argument checks, `_philox.py` specifies the dropout
masks, and `_tuned.py` finds tile shapes. An operation's file imports no other's; `block.py` alone is above them.
"""

from phi1.kernels._backend import backend
from phi1.kernels._checks import check_values
from phi1.kernels._philox import Dropout
from phi1.kernels.layer_norm import add_layer_norm, layer_norm

__all__ = ["Dropout", "add_layer_norm", "backend", "check_values", "layer_norm"]
