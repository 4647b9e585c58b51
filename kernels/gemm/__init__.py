"""Linear layers as tiled matrix products. Imports core and pointwise."""
