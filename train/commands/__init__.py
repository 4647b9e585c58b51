"""Subcommands of `phi1` on runs and corpora. Imports every room but run."""
