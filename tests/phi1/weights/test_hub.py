"""`phi1 push`: the files that go to the Hub, and one line for every refusal. The Hub is played by a class."""

import hashlib
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError
from tiny_models import TINY, tiny_model

from phi1.cli.main import main
from phi1.weights.huggingface import save_state_dict

CARD = '# tiny\n\n```python\nmodel = "."\n```\n'


class Hub:
    """The calls of HfApi that `push` makes."""

    def __init__(self, fails=None):
        self.fails, self.repositories, self.files = fails, {}, {}

    def create_repo(self, repository, *, private, exist_ok):
        if self.fails:
            raise self.fails
        assert exist_ok
        self.repositories[repository] = private

    def create_commit(self, repository, operations, *, commit_message):
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"https://hub/{repository}/commit/1")


@pytest.fixture
def export(tmp_path):
    save_state_dict(tiny_model().state_dict(), TINY, tmp_path / "export", card=CARD)
    (tmp_path / "export" / "notes.txt").write_text("mine")
    return tmp_path / "export"


@pytest.fixture
def hub(monkeypatch):
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    return found


@pytest.mark.parametrize("private", [True, False])
def test_it_uploads_the_model_and_a_card_that_names_the_repository(export, hub, capsys, private):
    assert main(["push", str(export), "me/tiny", *["--private"] * private]) == 0
    assert capsys.readouterr().out.endswith("uploaded to https://hub/me/tiny/commit/1\n")
    assert hub.repositories == {"me/tiny": private or None}
    assert hub.files.keys() == {"config.json", "generation_config.json", "model.safetensors", "README.md", "SHA256SUMS"}
    assert hub.files["README.md"].decode() == CARD.replace('"."', '"me/tiny"')
    hashes = dict(reversed(line.split("  ")) for line in hub.files["SHA256SUMS"].decode().splitlines())
    assert hashes == {name: hashlib.sha256(content).hexdigest() for name, content in hub.files.items()
                      if name != "SHA256SUMS"}
    assert (export / "README.md").read_text() == CARD


def test_a_dry_run_lists_files_and_uploads_none(export, hub, capsys):
    assert main(["push", str(export), "me/tiny", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["README.md", "SHA256SUMS", "config.json",
                                                        "generation_config.json", "model.safetensors"]
    assert lines[-1].endswith("bytes; nothing was uploaded to me/tiny")
    assert not hub.repositories


def refused(status):
    error = OSError("403 Forbidden\n\nlong\nstory")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.mark.parametrize(("error", "message"), [
    (refused(401), "push: me/tiny: no permission; log in with `hf auth login`"),
    (refused(403), "push: me/tiny: no permission; log in with `hf auth login`"),
    (LocalTokenNotFoundError("no token"), "push: me/tiny: no permission; log in"),
    (ConnectionError("no route\nto the Hub"), "push: me/tiny: no route to the Hub"),
])
def test_a_refusal_of_the_hub_is_one_line(export, hub, capsys, error, message):
    hub.fails = error
    assert main(["push", str(export), "me/tiny"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"phi1 push: error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("damage", "repository", "message"), [
    (None, "tiny", "push: the repository must be OWNER/NAME, of letters"),
    ("config.json", "me/tiny", "config.json is missing"),
    ("model.safetensors", "me/tiny", "holds no weights"),
    ("generation_config.json", "me/tiny", "generation_config.json: No such file"),
    ("", "me/tiny", "there is no such folder; give an export"),
])
def test_what_is_no_whole_export_is_refused(export, hub, capsys, damage, repository, message):
    if damage:
        (export / damage).unlink()
    assert main(["push", str(export / "none" if damage == "" else export), repository]) == 2
    assert message in capsys.readouterr().err
    assert not hub.repositories
