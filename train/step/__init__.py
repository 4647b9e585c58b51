"""One optimizer step. Imports runtime, recipe and data."""
