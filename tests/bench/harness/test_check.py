"""The checks before a time counts and after the rounds: nothing that is wrong becomes a result."""

import pytest
import torch
from double_case import double, make

from phi1 import preset
from phi1.bench.cases import host
from phi1.bench.cases import model as cases_model
from phi1.bench.cases.registry import all_cases, select
from phi1.bench.harness import check, runner
from phi1.bench.harness.roof import Roof
from phi1.bench.harness.runner import Runner
from phi1.bench.peers import training
from phi1.bench.peers.training import Phi1Step, Plan, TransformersStep
from phi1.bench.report import report

CPU = torch.device("cpu")
TINY = Plan(preset("nano", vocab_size=64, num_hidden_layers=1, hidden_size=64, intermediate_size=128,
                   num_attention_heads=2, rotary_dim=16), 4, 16)


def run(case, peers=()):
    record = Runner(CPU, peers, seconds=0.02, quick=True).run(case)
    return record, record["providers"][0]


def test_a_function_that_gives_its_first_result_for_ever_is_wrong():
    first = []

    def remembers(inputs):
        first.append(double(inputs)) if not first else None
        return first[0]

    _, entry = run(make(function=remembers))
    assert entry["status"] == "wrong"
    assert entry["reason"].startswith("behind its rounds out0 is off by")


def test_what_works_in_place_is_judged_on_what_was_not_rotated_yet():
    (case,) = select("cpu", ["rotary_"])
    record, _ = run(case, ["torch"])
    assert [entry["status"] for entry in record["providers"]] == ["ok", "ok"]


def test_a_function_that_goes_wrong_in_its_rounds_is_wrong():
    calls = []

    def wears_out(inputs):
        calls.append(None)
        return double(inputs) * (1 if len(calls) < 3 else 1.01)

    assert run(make(function=wears_out))[1]["status"] == "wrong"


def test_a_function_that_raises_behind_its_rounds_has_failed(monkeypatch):
    def refuses(self, row, exact, when=""):
        if when:
            raise RuntimeError("no more")

    monkeypatch.setattr(Runner, "_judge", refuses)
    _, entry = run(make())
    assert (entry["status"], entry["reason"]) == ("failed", "RuntimeError: no more")
    assert "ms" not in entry


@pytest.mark.parametrize(("share", "status"), [(1.4, "ok"), (1.6, "wrong")])
def test_a_time_beyond_the_roof_is_no_result(share, status, monkeypatch):
    monkeypatch.setattr(Roof, "ms", lambda self, case: share)
    monkeypatch.setattr(runner.Row, "ms", 1.0)
    _, entry = run(make())
    assert entry["status"] == status
    assert "ratio" in entry if status == "ok" else entry["reason"] == "its time is that of 1.6 times the measured roof"


def test_what_has_no_reference_is_marked_in_the_readme():
    record, _ = run(make(reference=None))
    assert record["note"] == "unchecked: there is no reference"
    assert report.row(record).startswith("| double N=64 (unchecked) |")

    def too_large(inputs):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    record, _ = run(make(reference=too_large))
    assert report.row(record).startswith("| double N=64 (unchecked) |")
    assert report.row(run(make())[0]).startswith("| double N=64 |")


def test_every_case_has_a_reference_but_those_of_random_dropout():
    assert {case.op for case in all_cases() if case.reference is None} == {"micro-step", "train-step"}
    assert all("dropout" in case.shape for case in all_cases() if case.reference is None)


def of_nano(op):
    (case,) = select("cpu", [op], quick=True)
    return case


@pytest.mark.parametrize(("op", "peers"), [("load", ["transformers"]), ("save", ["transformers", "torch.save"])])
def test_loading_and_saving_are_right(op, peers):
    record, _ = run(of_nano(op), peers)
    assert [entry["provider"] for entry in record["providers"]] == ["phi1", *peers]
    assert {(entry["status"], entry.get("error")) for entry in record["providers"]} == {("ok", 0.0)}


def zeros(load):
    def loaded(*arguments, **options):
        model = load(*arguments, **options)
        for parameter in model.parameters():
            parameter.data.zero_()
        return model

    return loaded


def nearly(load):
    def loaded(*arguments, **options):
        model = load(*arguments, **options)
        bits = model.get_parameter("blocks.1.norm.bias").data.view(torch.int16)
        bits[3] ^= 1
        return model

    return loaded


@pytest.mark.parametrize("breaks", [zeros, nearly])
def test_loading_something_else_is_wrong(breaks, monkeypatch):
    from phi1.weights import huggingface

    monkeypatch.setattr(huggingface, "load", breaks(huggingface.load))
    assert run(of_nano("load"))[1]["status"] == "wrong"


def two_bytes(save):
    def saved(model, folder):
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes(b"{}")

    return saved


def once(save):
    done = []

    def saved(model, folder):
        if not done:
            done.append(save(model, folder))

    return saved


def other_weights(save):
    def saved(model, folder):
        save(host.build(model.config, CPU, torch.float16).half().apply(
            lambda module: [p.data.mul_(1.01) for p in module.parameters(recurse=False)]), folder)

    return saved


@pytest.mark.parametrize("breaks", [two_bytes, once, other_weights])
def test_saving_something_else_is_no_result(breaks, monkeypatch):
    from phi1.weights import huggingface

    host._saved.cache_clear()
    host._saved(preset("nano"))
    monkeypatch.setattr(huggingface, "save", breaks(huggingface.save))
    assert run(of_nano("save"))[1]["status"] in ("wrong", "failed")


@pytest.fixture
def train_step():
    yield cases_model._step(TINY)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_training_step_and_its_peer_are_right(train_step):
    record, entry = run(train_step, ["transformers"])
    assert [each["status"] for each in record["providers"]] == ["ok", "ok"]
    assert 0 < entry["error"] < 0.02
    assert 0 < record["eager_error"] < 0.02


def the_first_outcome(monkeypatch):
    from phi1.train.step.trainer import Trainer

    taken, first = Trainer.run_step, []

    def run_step(self):
        first.append(taken(self)) if not first else None
        return first[0]

    monkeypatch.setattr(Trainer, "run_step", run_step)


def no_update(monkeypatch):
    from phi1.train.step.trainer import Trainer

    monkeypatch.setattr(Trainer, "_update", lambda self, *arguments: None)




def half_the_batch(monkeypatch):
    from phi1.train.step.trainer import Trainer

    accumulate = Trainer._accumulate
    monkeypatch.setattr(Trainer, "_accumulate", lambda self, step, batches, count: accumulate(
        self, step, [(ids[:2], rows[:2]) for ids, rows in batches], count / 2))


def the_same_batch(monkeypatch):
    from phi1.train.step.trainer import Trainer

    batch = Trainer._batch
    monkeypatch.setattr(Trainer, "_batch", lambda self, step: batch(self, 0))


@pytest.mark.parametrize("breaks", [the_first_outcome, no_update, half_the_batch, the_same_batch])
def test_a_trainer_that_trains_otherwise_is_wrong(breaks, train_step, monkeypatch):
    exact = check.Exact(train_step, train_step.draw(CPU))
    assert not exact.judge(Phi1Step(TINY), "phi1").complaint
    breaks(monkeypatch)
    assert exact.judge(Phi1Step(TINY), "phi1").complaint


def test_a_trainer_that_stands_still_has_no_times(train_step, monkeypatch):
    the_first_outcome(monkeypatch)
    assert run(train_step)[1]["status"] == "failed"


def test_a_step_that_is_not_taken_is_noticed_as_it_is_timed(train_step, monkeypatch):
    from phi1.train.step.trainer import Trainer

    step = train_step.providers[0].prepare(train_step, CPU)
    step()
    step()
    outcome = step.trainer.run_step()
    monkeypatch.setattr(Trainer, "run_step", lambda self: outcome)
    step()
    with pytest.raises(ArithmeticError, match="two steps have the same loss"):
        step()


def test_both_sides_of_a_training_step_start_again_with_the_same_bits(train_step):
    for step in (Phi1Step(TINY), TransformersStep(TINY)):
        first = step.judged()
        step()
        assert all(torch.equal(one, two) for one, two in zip(first, step.judged(), strict=True))
    assert first[0].shape == (training.JUDGED,)


def test_integers_have_no_tolerance():
    def off(by):
        return lambda inputs: torch.arange(1000) + by

    exact = check.Exact(make(reference=off(0)), {"x": torch.ones(1)})
    assert not exact.judge(off(0), "phi1").complaint
    almost = torch.arange(1000)
    almost[500] += 1
    assert exact.judge(lambda inputs: almost, "torch").complaint
