"""Loading a model from a folder that is replaced meanwhile: the result is one of the models, or one clear line."""

import shutil
import threading
import time
import weakref

import pytest
import torch
from tiny_models import assert_same, tiny_model

import phi1.weights.folder
from phi1 import atomic
from phi1.weights.files import stream
from phi1.weights.huggingface import load, save


def replaced_when_read(monkeypatch, folder, *seeds):
    """Let each model replace the folder in one of the next readings, between two shards."""
    coming = [tiny_model(seed) for seed in seeds]

    def read(path, names):
        yield from stream(path, names)
        if coming and path.name.startswith("model-00002"):
            save(coming.pop(0), folder, max_shard_bytes=20_000)

    monkeypatch.setattr(phi1.weights.huggingface, "stream", read)
    return coming


@pytest.mark.parametrize("linked", [False, True])
def test_of_two_models_the_newer_is_read_whole(tmp_path, monkeypatch, linked):
    folder = tmp_path / "model"
    save(tiny_model(1), folder, max_shard_bytes=20_000)
    if linked:
        (tmp_path / "link").symlink_to(folder)
    coming = replaced_when_read(monkeypatch, folder, 2)
    assert_same(load(tmp_path / "link" if linked else folder, device="cpu"), tiny_model(2))
    assert not coming


def test_a_folder_replaced_again_and_again_is_one_line(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save(tiny_model(1), folder, max_shard_bytes=20_000)
    coming = replaced_when_read(monkeypatch, folder, 2, 3, 4)
    with pytest.raises(ValueError, match=f"^load: {folder} was replaced while it was read, and once more"):
        load(folder, device="cpu")
    assert len(coming) == 1


def test_an_error_of_a_replaced_folder_is_not_reported(tmp_path, monkeypatch):
    """The shards of a replaced folder are gone, or have other shapes."""
    folder = tmp_path / "model"
    save(tiny_model(1), folder, max_shard_bytes=20_000)
    survey, calls = phi1.weights.huggingface._survey, []

    def replaced(at, config):
        found = survey(at, config)
        calls.append(at)
        if len(calls) == 1:
            save(tiny_model(2), folder)
        return found

    monkeypatch.setattr(phi1.weights.huggingface, "_survey", replaced)
    assert_same(load(folder, device="cpu"), tiny_model(2))
    monkeypatch.setattr(phi1.weights.huggingface, "stream", lambda *args: calls.append(args) or 1 / 0)
    calls.clear()
    with pytest.raises(ZeroDivisionError):
        load(folder, device="cpu")
    assert len(calls) == 4  # the error of the second reading, of a folder that stayed


def test_a_folder_that_is_removed_is_said_to_be_gone(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save(tiny_model(1), folder)
    monkeypatch.setattr(phi1.weights.huggingface, "_survey", lambda *args: shutil.rmtree(folder))
    with pytest.raises(FileNotFoundError, match=f"^load: {folder}/config.json is missing"):
        load(folder, device="cpu")


def test_a_load_waits_where_two_folders_are_changing_places(tmp_path, monkeypatch):
    folder, check, loaded = tmp_path / "model", phi1.weights.folder._check_own, []
    save(tiny_model(1), folder)
    loading = threading.Thread(target=lambda: loaded.append(load(folder, device="cpu")))
    waits = threading.Event()

    def sleep(seconds, sleep=time.sleep):
        waits.set()
        sleep(10 * seconds)  # for a machine that does other things as well

    def between(found, *rest):
        check(found, *rest)
        if found != folder:
            assert not folder.exists()
            loading.start()
            assert waits.wait(300)

    monkeypatch.setattr(atomic.time, "sleep", sleep)
    monkeypatch.setattr(phi1.weights.folder, "_check_own", between)
    save(tiny_model(2), folder)
    loading.join()
    assert_same(loaded[0], tiny_model(2))


def test_a_folder_below_one_that_may_not_be_read_is_loaded(tmp_path):
    save(tiny_model(1), tmp_path / "closed" / "model")
    (tmp_path / "closed").chmod(0o300)
    assert_same(load(tmp_path / "closed" / "model", device="cpu"), tiny_model(1))
    (tmp_path / "closed").chmod(0o700)


def test_the_model_of_a_first_reading_is_not_kept_for_the_second(tmp_path, monkeypatch):
    folder, alive = tmp_path / "model", []
    save(tiny_model(1), folder, max_shard_bytes=20_000)
    replaced_when_read(monkeypatch, folder, 2)
    build = phi1.weights.huggingface._read

    def counted(*args):
        assert not [model for model in alive if model()]
        model = build(*args)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(phi1.weights.huggingface, "_read", counted)
    load(folder, device=torch.device("cpu"))
    assert len(alive) == 2
