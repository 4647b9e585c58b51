"""The language-model head fused with its loss. Imports core."""
