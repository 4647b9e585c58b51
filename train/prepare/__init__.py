"""Documents in, a corpus out. Imports runtime, recipe and data."""
