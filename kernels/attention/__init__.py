"""Causal and full attention, on separate or packed q, k, v. Imports core and pointwise."""
