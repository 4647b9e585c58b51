"""The `phi1` command, one file a subcommand. Nothing imports it."""
