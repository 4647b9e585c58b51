"""The language-model head with its loss. Imports core."""
