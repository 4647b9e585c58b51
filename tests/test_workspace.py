"""The temporary folder that a corpus is made in, while other processes make, sweep and abandon theirs."""

import os
import threading
from pathlib import Path

import pytest

from phi1.train.workspace import workspace


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_folder_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch, moment):
    """What another process that starts at the same time can do to it, at each moment at which it can."""
    swept = []

    def sweep(path):
        if not swept:
            swept.append(Path(path))
            os.rmdir(path)

    def swept_before_or_after(path, *args, open_=os.open, **options):
        if moment == "before it is opened":
            sweep(path)
        descriptor = open_(path, *args, **options)
        sweep(path)
        return descriptor

    monkeypatch.setattr(os, "open", swept_before_or_after)
    with workspace(tmp_path / "out", 0) as folder:
        assert [folder] == list(tmp_path.iterdir()) != swept
    assert os.listdir(tmp_path) == []


def test_many_at_once_do_not_disturb_one_another(tmp_path):
    """Each sweeps as it starts, at whatever moment the others are."""
    held, failed = [], []

    def make():
        try:
            for _ in range(100):
                with workspace(tmp_path / "out", 0) as folder:
                    (folder / "file").touch()
                    held.append(folder)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(set(held)) == 400
    assert os.listdir(tmp_path) == []
