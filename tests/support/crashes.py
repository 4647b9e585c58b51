"""A process that dies at a chosen place."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any


def ends_early(act: Callable[[], Any]) -> bool:
    """Do it in a forked process, in which something is to call os._exit(0); whether that was called."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
