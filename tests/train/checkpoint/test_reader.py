"""A stranger's checkpoint, with a program in each place that is a pickle: it is refused, and nothing runs."""

import io
import os
import pickle
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from training_runs import SMALL, make_trainer, save_checkpoint

from phi1.train.checkpoint.checkpoint import load_checkpoint
from phi1.train.checkpoint.convert import read_weights
from phi1.train.checkpoint.files import describe, find_damage, write_manifest
from phi1.train.checkpoint.reader import _Reader
from phi1.train.recipe.file import read_recipe
from phi1.train.run.resume import defining
from phi1.train.runtime.launch import RunError

SHAPE = {f"model.{key}": value for key, value in asdict(SMALL).items() if "dropout" not in key}


class Program:
    """A value whose pickle makes a folder when it is read."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.fixture(scope="module")
def saved(small_corpus, engines, tmp_path_factory):
    trainer = make_trainer(small_corpus, engines)
    trainer.run_step()
    facts = {"defining": defining(read_recipe(None, {})) | SHAPE}
    return save_checkpoint(trainer, tmp_path_factory.mktemp("run") / "checkpoints", facts, keep=1)


def table(checkpoint):
    return pickle.loads((checkpoint / ".metadata").read_bytes())


def store(checkpoint, metadata):
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_the_table(checkpoint, program):
    store(checkpoint, program)


def in_a_field_of_the_table(checkpoint, program):
    store(checkpoint, replace(table(checkpoint), planner_data=program))


def under_a_dotted_name(checkpoint, program):
    name = b"serialization.os.mkdir"  # protocol 4 follows the dots
    path = program.folder.encode()
    (checkpoint / ".metadata").write_bytes(
        b"\x80\x04\x8c\x05torch\x8c" + bytes([len(name)]) + name + b"\x93\x8c" + bytes([len(path)]) + path + b"\x85R.")


def in_place_of_a_tensor(checkpoint, program, as_bytes=True):
    metadata, written = table(checkpoint), io.BytesIO()
    torch.save(program, written)
    index = next(index for index in metadata.storage_data if index.fqn == "model.embed.weight")
    place = metadata.storage_data[index]
    shard = checkpoint / place.relative_path
    metadata.storage_data[index] = replace(place, offset=shard.stat().st_size, length=len(written.getvalue()))
    if as_bytes:
        metadata.state_dict_metadata["model.embed.weight"] = BytesStorageMetadata()
        metadata.storage_data[replace(index, offset=None, index=None)] = metadata.storage_data[index]
    with open(shard, "ab") as file:
        file.write(written.getvalue())
    store(checkpoint, metadata)


def in_a_tensor(checkpoint, program):
    in_place_of_a_tensor(checkpoint, program, as_bytes=False)


def in_another_file(checkpoint, program):
    metadata = table(checkpoint)
    for index, place in metadata.storage_data.items():
        metadata.storage_data[index] = replace(place, relative_path="../elsewhere")
    store(checkpoint, metadata)


@pytest.mark.parametrize("read", ["convert", "resume"])
@pytest.mark.parametrize(("plant", "complaint"), [
    (in_the_table, r"asks for 'posix\.mkdir'"), (in_a_field_of_the_table, r"asks for 'posix\.mkdir'"),
    (under_a_dotted_name, r"asks for 'torch\.serialization\.os\.mkdir'"),
    (in_place_of_a_tensor, "'model.embed.weight' is no tensor but a pickle"),
    (in_a_tensor, "Weights only load failed"), (in_another_file, r"names '\.\./elsewhere'"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_no_program_in_a_checkpoint_runs(saved, small_corpus, engines, tmp_path, plant, complaint, read):
    checkpoint, marker = shutil.copytree(saved, tmp_path / "step-1"), tmp_path / "ran"
    plant(checkpoint, Program(marker))
    names = [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"]
    write_manifest(checkpoint, {name: describe(checkpoint / name) for name in names})
    assert find_damage(checkpoint) is None  # its hashes are right: the stranger has computed them
    with pytest.raises(RunError, match=complaint) as raised:
        read_weights(checkpoint) if read == "convert" else load_checkpoint(make_trainer(small_corpus, engines),
                                                                            checkpoint)
    assert "\n" not in str(raised.value)
    assert not marker.exists()


def named(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


PROPERTIES = named("torch.distributed.checkpoint.metadata", "TensorProperties")
INDEX = named("torch.distributed.checkpoint.metadata", "MetadataIndex")


@pytest.mark.parametrize(("pickled", "complaint"), [
    (PROPERTIES + b"N}X\x05\0\0\0evil\x21K\1s\x86b.", "sets attributes of TensorProperties"),  # (None, {"evil!": 1})
    (named("torch.serialization", "_get_layout") + b"}X\x05\0\0\0evil\x21K\1sb.", "sets attributes of _get_layout"),
    (INDEX + b")\x81}X\x05\0\0\0evil\x21K\1sb.", "sets attributes of MetadataIndex"),
    (b"Nr\xff\xff\xff\x3f.", "no table"),  # LONG_BINPUT 2**30 - 1
    (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "an operation that no checkpoint needs"),  # BYTEARRAY8
    (b"\x8d" + (1 << 40).to_bytes(8, "little") + b".", "an operation that no checkpoint needs"),  # BINUNICODE8
    (b"\x95" + (1 << 40).to_bytes(8, "little") + b"N.", "no table"),  # FRAME
    (b"X\xff\xff\xff\xffN.", "no table"),  # BINUNICODE
    (b"})" + b"\x85" * 1_000_000 + b"Ns.", "a key of type tuple"),  # a key whose hash overflows the stack
    (b"a.", "no table"), (b"", "no table"), (b"N.", "no table"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_hostile_table_is_one_line(tmp_path, pickled, complaint):
    (tmp_path / ".metadata").write_bytes(pickled)
    with pytest.raises(RunError, match=complaint) as raised:
        _Reader(tmp_path).read_metadata()
    assert len(str(raised.value)) < 400
    assert "\n" not in str(raised.value)


def test_a_pipe_as_the_table_does_not_block(tmp_path):
    os.mkfifo(tmp_path / ".metadata")
    with pytest.raises(OSError, match="a pipe"):
        _Reader(tmp_path).read_metadata()


def test_the_programs_would_run(saved, tmp_path):
    """Prove that what is planted above is dangerous to readers that trust it."""
    for plant in (in_the_table, under_a_dotted_name):
        checkpoint, marker = shutil.copytree(saved, tmp_path / plant.__name__), tmp_path / f"ran-{plant.__name__}"
        plant(checkpoint, Program(marker))
        table(checkpoint)
        assert marker.exists()


def test_a_checkpoint_holds_tensors_alone(saved):
    assert not [name for name, kind in table(saved).state_dict_metadata.items()
                if isinstance(kind, BytesStorageMetadata)]
