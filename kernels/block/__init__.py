"""phi's parallel block: the order of other operations' launches. Imports all rooms of kernels."""
