"""phi's parallel block, which orders the launches of other operations. Imports all rooms of kernels."""
