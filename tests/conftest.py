"""A prepared corpus and an undisturbed run of it, made once for all tests of runs."""

import pytest

from phi1.train.testing import make_corpus, train


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A working directory with a prepared corpus in data/."""
    folder = tmp_path_factory.mktemp("runs")
    make_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(place):
    """A whole run in one process, in whole/, and what it printed."""
    return train(place, "whole")
