"""A prepared corpus and an undisturbed run of it, made once for all tests of runs."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """What a test draws without a generator is the same in every run and every order."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A working directory with a prepared corpus in data/."""
    from phi1.train.testing import make_corpus  # only here: tests of kernels do without what it needs

    folder = tmp_path_factory.mktemp("runs")
    make_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(place):
    """A whole run in one process, in whole/, and what it printed."""
    from phi1.train.testing import train

    return train(place, "whole")


@pytest.fixture(scope="session")
def undisturbed_pair(place):
    """The same run in two processes, in pair/, and what it printed."""
    from phi1.train.testing import train

    return train(place, "pair", 2)
