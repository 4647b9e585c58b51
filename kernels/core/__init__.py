"""Code that several operations share and that has no shape of its own. Imports only torch and Triton."""
