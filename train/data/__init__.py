"""A corpus as training reads it. Imports runtime."""
