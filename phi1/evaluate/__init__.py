"""HumanEval: problems, sampling, running the tests, pass@k."""
