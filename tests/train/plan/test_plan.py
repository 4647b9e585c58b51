"""`phi1 plan`: its states against the bytes that the trainer holds, its arithmetic against published figures."""

import json
import math
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_runs import in_processes

from phi1.cli.main import main
from phi1.config import preset
from phi1.gpus import GPUS, gpu_named
from phi1.train.commands import plan
from phi1.train.plan.measured import measured_mfu
from phi1.train.plan.plan import Cluster, activations, duration, largest_micro_batch, memory, report, states
from phi1.train.recipe.file import read_recipe
from phi1.train.recipe.recipe import ACTIVATIONS, Model, Recipe, Train
from phi1.train.runtime import engine
from phi1.train.runtime.adapters import shapes
from phi1.train.step.trainer import make_optimizer

BASE = read_recipe(Path(__file__).parents[3] / "train" / "configs" / "phi1-base.toml", {})
A100S = Cluster(GPUS["a100-80"], 8)


def held(rank, store):
    """Return the bytes that a process holds in the second of two micro-steps, when the gradients have been reduced."""
    engine.Engine.is_alone = False  # FSDP at one process too, as on a GPU
    machine = engine.start(rank, "cpu", "bf16", 1)
    engine.connect_processes(machine, rank, store)
    model = engine.build_model(preset("nano"), machine, seed=1)
    optimizer = make_optimizer(model, Train())
    ids = torch.randint(4096, (2, 33))
    found = {}

    def bytes_of(tensors):
        return sum(x.numel() * x.element_size() for x in tensors)

    for last in (False, True):
        engine.set_last_micro_step(model, last)
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        if not last:
            found["gathered"] = bytes_of(model.parameters())
        loss.backward()
        if not last:
            groups = [module._get_fsdp_state()._fsdp_param_group for module in engine._sharded_modules(model)]
            found["accumulated"] = bytes_of(p.unsharded_accumulated_grad for group in groups if group
                                            for p in group.fsdp_params)
    found["parameters"] = bytes_of(p.to_local() for p in model.parameters())
    found["gradients"] = bytes_of(p.grad.to_local() for p in model.parameters())
    found["moments"] = bytes_of(state[key].to_local() for state in optimizer.state.values()
                                for key in ("exp_avg", "exp_avg_sq"))
    dist.destroy_process_group()
    return found


@pytest.mark.parametrize("processes", [1, 2])
def test_states_are_within_3_percent_of_the_trainers_bytes(tmp_path, processes):
    names = ("parameters", "gradients", "moments", "gathered", "accumulated")
    planned = dict(zip(names, states(preset("nano"), processes, 2, 2).values(), strict=True))
    for found in in_processes(processes, held, tmp_path):
        assert found == {name: pytest.approx(n_bytes, rel=0.03) for name, n_bytes in planned.items()}


def test_arithmetic_of_phi1():
    config = preset("phi1")
    assert config.flops_per_token(2048) == pytest.approx(9.088e9, rel=1e-4)
    assert config.flops_per_token(2048, causal=True) == pytest.approx(8.484e9, rel=1e-4)
    assert activations(config, 2048, 2) / 2**30 <= 1.75
    # 20.5k tokens/s a GPU at 59.9 %, as the fastest published run of this size.
    fast = replace(A100S, mfu=0.599)
    speed = 1024 * 2048 / duration(BASE, fast).step / 8
    assert speed == pytest.approx(20_560, rel=0.01)


def test_the_largest_micro_batch_fits_and_the_next_does_not():
    for gpu in GPUS.values():
        cluster = Cluster(gpu, 8)
        best = largest_micro_batch(BASE, cluster)
        assert 128 % best == 0
        assert sum(memory(BASE, cluster, best).values()) <= gpu.memory_gib * 2**30
        if best < 128:
            assert sum(memory(BASE, cluster, 2 * best).values()) > gpu.memory_gib * 2**30


def test_a_plan_that_does_not_fit_names_the_setting_to_change():
    small = Cluster(GPUS["a100-40"], 8)
    text = "\n".join(report(BASE, small))
    assert "DOES NOT FIT" in text
    assert "set train.micro_batch_size to 8, the largest that fits" in text
    tiny = replace(small, gpu=replace(small.gpu, memory_gib=8.0))
    assert ("no micro-batch fits: set run.reshard to true and train.activations to block, or take GPUs with more memory"
            in report(BASE, tiny))


@pytest.mark.parametrize(("layers", "gpus", "nodes", "memory_gib", "ways"), [
    (24, 1, 1, 28.0, "set run.reshard to true, or take 2 GPUs, or "),
    (24, 1, 1, 20.0, "take 2 GPUs and set run.reshard to true, or take 4 GPUs, or "),
    (24, 2, 1, 24.0, "set train.activations to recompute-mlp: then 1 fits, for 9% more arithmetic, or set run.reshard "
                     "to true, or take 4 GPUs, or "),
    (96, 1, 1, 39.4, "take 4 GPUs and set run.reshard to true, or "),
    (96, 2, 2, 39.4, "take 8 GPUs and set run.reshard to true, or "),  # four on each node, which holds a copy
    (96, 8, 1, 39.4, "set run.reshard to true, or "),  # a node is full
    (96, 1, 1, 8.0, ""),
])
def test_if_nothing_fits_only_helpful_settings_are_proposed(layers, gpus, nodes, memory_gib, ways):
    recipe = replace(BASE, model=replace(BASE.model, num_hidden_layers=layers))
    cluster = Cluster(replace(GPUS["a100-40"], memory_gib=memory_gib), gpus, nodes)
    assert f"no micro-batch fits: {ways}take GPUs with more memory" in report(recipe, cluster)


def test_keeping_less_is_proposed_with_its_price():
    def with_mode(mode):
        return replace(BASE, train=replace(BASE.train, activations=mode))

    none, mlp, block = (activations(BASE.phi1_config(), 2048, 2, mode) for mode in ACTIVATIONS)
    assert 2 * mlp < 1.2 * none
    assert 8 * block < none
    eight, two = (Cluster(GPUS["a100-40"], gpus) for gpus in (8, 2))
    assert ("set train.micro_batch_size to 8, the largest that fits, or set train.activations to recompute-mlp: "
            "then 16 fits, for 9% more arithmetic") in report(BASE, eight)
    assert "set train.activations to block: then 16 fits, for 20% more" in "\n".join(report(BASE, two))
    assert "set train.activations" not in "\n".join(report(with_mode("block"), replace(two, gpus=1)))
    assert largest_micro_batch(with_mode("recompute-mlp"), eight) == 16
    # Not one sequence fits until each layer keeps only its input.
    long = replace(BASE, data=replace(BASE.data, seq_len=32_768),
                   model=replace(BASE.model, max_position_embeddings=32_768))
    assert "no micro-batch fits: set train.activations to" in "\n".join(report(long, eight))
    more = duration(with_mode("block"), A100S).arithmetic / duration(BASE, A100S).arithmetic
    assert more == pytest.approx(1 + (14 * 2048**2 * 24 + 4 * 2048 * 2048 * 24) / 9.088e9, rel=1e-3)


def test_sharding_within_nodes_and_resharding_change_memory_and_collectives():
    two_nodes = replace(A100S, gpus=16, nodes=2)
    one, hybrid = states(BASE.phi1_config(), 8, 2, 4), memory(BASE, two_nodes, 16)
    assert {name: hybrid[name] for name in one} == one  # each node holds a copy
    everywhere = replace(BASE, run=replace(BASE.run, shard_group=16))
    assert memory(everywhere, two_nodes, 16)["parameters, fp32, sharded"] == one["parameters, fp32, sharded"] / 2
    assert duration(BASE, two_nodes).collectives < duration(everywhere, two_nodes).collectives
    small = replace(BASE, run=replace(BASE.run, reshard=True))
    resharded = memory(small, A100S, 16)
    assert resharded["gradients of the micro-steps, fp32"] == 0
    assert resharded["parameters, gathered, 16 bits"] < one["parameters, gathered, 16 bits"] / 4
    assert duration(small, A100S, 8).collectives > 10 * duration(BASE, A100S, 8).collectives
    # Eight cards of 16 GB have no room for phi-1 gathered whole, and do not need it.
    sixteen = Cluster(replace(GPUS["a100-40"], memory_gib=15.5), 8)
    assert largest_micro_batch(BASE, sixteen) == 0 < largest_micro_batch(small, sixteen)


def test_the_report_reconciles_the_published_figures(capsys):
    assert main(["plan", "--price", "2"]) == 0
    text = capsys.readouterr().out
    for figure in ("1,418,270,720", "50.33 B tokens", "53.48 B in all", "13,021 tokens/s", "18,398", "at 2 a GPU-hour"):
        assert figure in text, figure
    assert "less at other moments: buffers of the largest reduction 1.27; chunk of logits, head's gradient 1.09" in text
    assert "the 6 days are 18,204 as well" in text  # 36,000 steps in 6 days are 24,000 in 4, the paper's time
    assert main(["plan", "--config", "train/configs/nano.toml", "--gpus", "1"]) == 0
    assert "the card" not in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--gpus", "7"], "--gpus must divide train.batch_size, 1024; got 7; 1, 2, 4, 8"),
    (["--gpus", "8", "--nodes", "3"], "--nodes must divide --gpus, 8; got 3"),
    (["--gpu", "a10"], "invalid choice: 'a10'"),
    (["--gpsu", "8"], "unrecognized arguments: --gpsu; did you mean --gpu"),
    (["--mfu", "3"], "argument --mfu: invalid share of 1 value: '3'"),
    (["--price", "nan"], "argument --price: invalid number above 0 value: 'nan'"),
    (["--run.shard_group", "3"], "run.shard_group must divide the number of processes, 8; got 3"),
    (["--train.stesp", "3"], "'train.stesp' is not a key; the nearest is train.steps"),
    (["--train.micro_batch_size", "3"], "train.micro_batch_size must divide 1024 / 8 = 128; got 3"),
    (["--config", "nosuch.toml"], "--config nosuch.toml: No such file or directory"),
])
def test_bad_usage_ends_in_one_line_and_code_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_the_larger_of_the_two_times_is_the_roof():
    h100 = GPUS["h100-80"]
    assert h100.ms(3.35e9, 0) == pytest.approx(1.0)
    assert h100.ms(0, 989.4e9) == pytest.approx(1.0)
    assert h100.ms(0, 66.9e9, "float32") == pytest.approx(1.0)


def test_a_drivers_name_finds_its_gpu():
    for driver, name in (("NVIDIA H100 80GB HBM3", "h100-80"), ("NVIDIA A100-SXM4-80GB", "a100-80"),
                         ("NVIDIA A100-SXM4-40GB", "a100-40"), ("NVIDIA H200", "h200"),
                         ("AMD Instinct MI300X", "mi300x")):
        found = gpu_named(driver)
        assert found is not None
        assert found.name == name
    assert gpu_named("NVIDIA GeForce RTX 4090") is None


def test_every_recipe_that_is_shipped_is_read_and_names_its_tokens():
    tokens = {}
    for file in sorted((Path(__file__).parents[3] / "train" / "configs").glob("*.toml")):
        recipe = read_recipe(file, {})
        assert isinstance(recipe, Recipe)
        tokens[file.stem] = recipe.train.steps * recipe.train.batch_size * recipe.data.seq_len
    assert tokens["phi1-base"] == 50_331_648_000
    assert tokens["phi1"] == 3_145_728_000
    assert f"{(tokens['phi1-base'] + tokens['phi1']) / 1e9:.2f}" == "53.48"  # "the 54B-token run"
    assert tokens["phi1-small"] == 75_497_472_000


def test_the_measured_share_of_the_peak_is_taken_where_there_is_one(tmp_path, monkeypatch, capsys):
    (tmp_path / "results" / "h100").mkdir(parents=True)
    for day, speed in (("01", 40_000), ("02", 50_000)):
        (tmp_path / "results" / "h100" / f"2026-11-{day}-train.json").write_text(json.dumps(
            {"environment": {"gpu": "NVIDIA H100 80GB HBM3"}, "tokens_per_s": speed, "tokens_per_s_dropout_0.1": 45_000,
             "flops_per_token": {"with attention": 9.088e9}}))
    monkeypatch.setattr(plan, "measured_mfu",
                        lambda gpu, dropout: measured_mfu(gpu, dropout, tmp_path / "results"))
    for arguments, expected in (
        (["--gpu", "h100-80"], "MFU 0.41 (results/h100/2026-11-02-train.json)"),  # 45,000 x 9.088e9 / 989.4e12
        (["--gpu", "h100-80", "--train.dropout", "0"], "MFU 0.46 (results/h100/2026-11-02-train.json)"),
        (["--gpu", "h100-80", "--train.precision", "fp32"], "MFU 0.40 (assumed)"),
        (["--gpu", "h100-80", "--mfu", "0.3"], "MFU 0.30 (given)"),
        (["--gpu", "a100-80"], "MFU 0.40 (assumed)"),
    ):
        assert main(["plan", *arguments]) == 0
        assert expected in capsys.readouterr().out


def test_the_answer_takes_at_most_three_seconds():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "from phi1.cli.main import main; main(['plan'])"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.0  # 0.4 measured


def test_adapters_alone_have_gradients_and_moments():
    recipe = replace(Recipe(), model=Model(preset="phi1", init="microsoft/phi-1", lora_rank=16))
    config = recipe.phi1_config()
    count = config.num_hidden_layers * sum(math.prod(shape) for shape in shapes(config, 16).values())
    assert recipe.adapters() == count
    full, adapted = (states(config, 1, 2, 2, adapters=adapters) for adapters in (0, count))
    assert adapted["gradients, fp32, sharded"] == 4 * count
    assert adapted["AdamW's two moments, fp32, sharded"] == 8 * count
    assert sum(adapted.values()) < 0.4 * sum(full.values())
