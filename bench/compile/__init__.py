"""The compile gate: every kernel compiled without a GPU. Imports report and the rooms below it."""
