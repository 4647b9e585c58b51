"""The operations of phi-1, as Triton kernels where there is one and as PyTorch code everywhere.

Each room computes one operation or one family of operations. Its `__init__.py` says what it may import:

    core             backend, checks, constants, tiles, memory, philox and sums; imports no other room
    pointwise, gemm  NAME.py holds the operator, the CPU path and the reference, NAME_triton.py the kernels
    cross_entropy, attention, block
                     spec.py < eager.py and *_triton.py < dispatch.py < the operators

Only `*_triton.py` import Triton, so a PyTorch built without GPUs never imports it. A PyTorch built for GPUs imports
them all below, so that no operation's first call waits for them. Otherwise the branch that launches a kernel imports
its file.
"""

from phi1.kernels.attention.attention import attention
from phi1.kernels.attention.attention_qkv import attention_qkv
from phi1.kernels.block.decode import parallel_block_decode
from phi1.kernels.block.parallel_block import parallel_block
from phi1.kernels.block.prefill import parallel_block_prefill
from phi1.kernels.core.backend import backend, built_for_gpus, load_kernels
from phi1.kernels.core.checks import check_values
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
