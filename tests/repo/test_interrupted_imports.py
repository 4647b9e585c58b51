"""Ctrl-C during the imports: PyTorch swallows it and goes on with half a NumPy, so phi1 imports NumPy first."""

import subprocess
import sys

import pytest

HOOK = """
import sys

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            sys.meta_path.remove(self)
            raise KeyboardInterrupt

sys.meta_path.insert(0, Stop())
"""


def stopped(code, cwd):
    return subprocess.run([sys.executable, "-c", HOOK + code], capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("arguments", [["convert", "--model", "none", "--out", "new"], ["doctor"],
                                       ["generate", "--model", "none", "--prompt", "x"]])
def test_a_command_ends_without_a_word(arguments, tmp_path):
    done = stopped(f"from phi1.cli.main import main; sys.exit(main({arguments}))", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("name", ["load", "generate", "Phi1", "WorkingCopies"])
def test_the_first_use_of_a_name_is_stopped_and_can_be_tried_again(name, tmp_path):
    done = stopped(f"import phi1\ntry: phi1.{name}\nexcept KeyboardInterrupt: print('stopped')\n"
                   "print('torch' in sys.modules, 'numpy' in sys.modules)", tmp_path)
    assert (done.stdout, done.stderr) == ("stopped\nFalse False\n", "")
