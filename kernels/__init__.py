"""The operations of phi-1, as Triton kernels where there is one and as PyTorch code everywhere.

An operation `op` is up to three files, so that a PyTorch without GPUs never imports Triton:

    op.py           the public function, its reference and its torch.library registration
    _op.py          what runs, without checks or autograd: the PyTorch code, or the launch of the kernels
    _op_triton.py   the Triton kernels and their launchers; imported inside the branch of _op.py that launches them, or
                    here where PyTorch is built for GPUs, so that no operation's first call waits for it

An operation's file imports no other's; what two of them share is in a `_*.py`. `block.py` and `block_decode.py` alone
are above the others. `_backend.py` decides which implementation runs, `_checks.py` has the argument checks,
`_philox.py` specifies the dropout masks, `_memory.py` keeps memory, and `_tuned.py` finds tile shapes.
"""

from phi1.kernels.attention.attention import attention
from phi1.kernels.attention.attention_qkv import attention_qkv
from phi1.kernels.block.decode import parallel_block_decode
from phi1.kernels.block.parallel_block import parallel_block
from phi1.kernels.block.prefill import parallel_block_prefill
from phi1.kernels.core.backend import backend, built_for_gpus, load_kernels
from phi1.kernels.core.checks import check_values
from phi1.kernels.core.cpu_memory import empty
from phi1.kernels.core.philox import Dropout
from phi1.kernels.cross_entropy.linear_cross_entropy import linear_cross_entropy
from phi1.kernels.gemm.linear import linear
from phi1.kernels.gemm.mlp import mlp
from phi1.kernels.pointwise.dropout import dropout_add
from phi1.kernels.pointwise.gelu import gelu
from phi1.kernels.pointwise.layer_norm import add_layer_norm, layer_norm
from phi1.kernels.pointwise.rotary import rotary, rotary_

if built_for_gpus():
    load_kernels()

__all__ = [
    "Dropout",
    "add_layer_norm",
    "attention",
    "attention_qkv",
    "backend",
    "check_values",
    "dropout_add",
    "empty",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "parallel_block",
    "parallel_block_decode",
    "parallel_block_prefill",
    "rotary",
    "rotary_",
]
