"""What two operations need and that has no shape of its own. Imports torch and Triton alone."""
