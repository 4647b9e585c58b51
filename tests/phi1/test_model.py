"""The model against transformers' PhiForCausalLM with equal random weights, and against itself: padding, cache."""

import pytest
import torch
from tiny_models import TINY

from phi1 import Cache, Phi1, preset
from phi1.kernels import backend
from phi1.model import Block

transformers = pytest.importorskip("transformers")

NANO = preset("nano", vocab_size=512, num_hidden_layers=2)
# phi-2's proportions: head size 80, rotary 32.
PHI2_LIKE = preset("nano", vocab_size=300, hidden_size=160, intermediate_size=640, num_attention_heads=2, rotary_dim=32,
                   num_hidden_layers=2, max_position_embeddings=128)
BOUND = 1e-5  # relative, float32: some 50 roundings of 6e-8 along the deepest chain, with room


def peer(config) -> transformers.PhiForCausalLM:
    """Return transformers' model with random weights, biases and norms, so that a misplaced one shows."""
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(transformers.PhiConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0,
                         "partial_rotary_factor": config.rotary_dim / config.head_dim},
        resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0, attn_implementation="eager",
        bos_token_id=None, eos_token_id=None,
    ))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.float().eval()


def as_ours(theirs: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Return the parameters of `Phi1` from tensors under transformers' names."""
    ours = {"embed.weight": theirs["model.embed_tokens.weight"], "head.weight": theirs["lm_head.weight"],
            "head.bias": theirs["lm_head.bias"], "norm.weight": theirs["model.final_layernorm.weight"],
            "norm.bias": theirs["model.final_layernorm.bias"]}
    for i in range(layers):
        layer, block = f"model.layers.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            ours[f"{block}norm.{kind}"] = theirs[f"{layer}input_layernorm.{kind}"]
            parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
            ours[f"{block}in_proj.{kind}"] = torch.cat([theirs[f"{layer}{part}.{kind}"] for part in parts])
        dense, fc2 = f"{layer}self_attn.dense", f"{layer}mlp.fc2"
        ours[f"{block}out_proj.weight"] = torch.cat([theirs[f"{dense}.weight"], theirs[f"{fc2}.weight"]], 1)
        ours[f"{block}out_proj.bias"] = torch.stack([theirs[f"{dense}.bias"], theirs[f"{fc2}.bias"]])
    return ours


def pair(config) -> tuple[transformers.PhiForCausalLM, Phi1]:
    theirs = peer(config)
    ours = Phi1(config).eval()
    ours.load_state_dict(as_ours(theirs.state_dict(), config.num_hidden_layers))
    return theirs, ours


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("config", [NANO, PHI2_LIKE], ids=["nano", "phi2-like"])
@pytest.mark.parametrize("tokens", [1, 17, 64, 67])  # one token, odd, a block, past a block by a prime
@pytest.mark.parametrize("implementation", ["default", "reference"])
def test_logits_loss_and_gradients_match_transformers(config, tokens, implementation):
    theirs, ours = pair(config)
    ids = torch.randint(config.vocab_size, (2, tokens + 1), generator=torch.Generator().manual_seed(tokens))
    x, y = ids[:, :-1], ids[:, 1:]
    exact = theirs(x).logits
    torch.nn.functional.cross_entropy(exact.flatten(0, 1), y.flatten()).backward()
    want_loss = torch.nn.functional.cross_entropy(exact.flatten(0, 1), y.flatten())
    want = as_ours({name: p.grad for name, p in theirs.named_parameters()}, config.num_hidden_layers)

    def run():
        return ours(x), ours.loss(x, y)

    if implementation == "reference":
        with backend("reference"):
            logits, loss = run()
    else:
        logits, loss = run()
    loss.backward()
    assert relative(logits, exact) <= BOUND
    assert loss.item() == pytest.approx(want_loss.item(), rel=BOUND)
    for name, p in ours.named_parameters():
        if tokens == 1 and name.endswith("in_proj.weight"):
            # One key: the softmax is constant and the true gradient of q and k is zero; compare the rest.
            rows = slice(2 * config.hidden_size, None)
            assert relative(p.grad[rows], want[name][rows]) <= BOUND, name
        else:
            assert relative(p.grad, want[name]) <= BOUND, name


def test_left_padded_batch_equals_single_prompts():
    _, model = pair(NANO)
    lengths, width = (5, 16, 1), 16
    prompts = [torch.randint(NANO.vocab_size, (1, n)) for n in lengths]
    ids = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
    with torch.no_grad():
        batched = model(ids, attention_mask=mask)
        for row, prompt in enumerate(prompts):
            single = model(prompt)[0]
            assert relative(batched[row, width - lengths[row] :], single) <= BOUND


@pytest.mark.parametrize("padded", [False, True])
def test_cache_equals_no_cache(padded):
    _, model = pair(PHI2_LIKE)
    ids = torch.randint(300, (2, 24))
    mask = torch.ones(2, 10, dtype=torch.int64)
    if padded:
        mask[0, :4] = 0
    full = torch.cat([mask, torch.ones(2, 14, dtype=torch.int64)], 1)
    with torch.no_grad():
        want = model(ids, attention_mask=full)
        cache = Cache(PHI2_LIKE, 2, 24)
        got = [model(ids[:, :10], attention_mask=mask, cache=cache)]
        got += [model(ids[:, 10:13], cache=cache)]
        got += [model(ids[:, i : i + 1], cache=cache) for i in range(13, 24)]
    assert cache.length == 24
    real = full.bool()
    assert relative(torch.cat(got, 1)[real], want[real]) <= BOUND


def test_a_prompt_goes_through_the_fused_block(monkeypatch):
    """With gradients it goes through separate operations, which have a backward. Both fill the cache alike."""
    model, ids, ways = Phi1(NANO).eval(), torch.randint(512, (2, 7)), []
    for name in ("prefill", "decode", "decode_with_gradients"):
        way = getattr(Block, name)
        monkeypatch.setattr(Block, name, lambda *a, name=name, way=way: ways.append(name) or way(*a))
    fused, stepped = Cache(NANO, 2, 9), Cache(NANO, 2, 9)
    with torch.no_grad():
        logits = model(ids, cache=fused)
        model(ids[:, :1], cache=fused)
    assert ways == ["prefill"] * NANO.num_hidden_layers + ["decode"] * NANO.num_hidden_layers
    ways.clear()
    assert relative(model(ids, cache=stepped), logits) <= BOUND
    assert ways == ["decode_with_gradients"] * NANO.num_hidden_layers
    assert relative(stepped.kv[..., :7, :, :].detach(), fused.kv[..., :7, :, :]) <= BOUND


@torch.no_grad()
def test_positions_behind_a_cache_are_checked():
    model, cache = Phi1(NANO).eval(), Cache(NANO, 1, 9)
    model(torch.zeros(1, 5, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match=r"^parallel_block_decode: positions must be at least 0 and less than \d+"):
        model(torch.zeros(1, 1, dtype=torch.int64), positions=torch.tensor([[1 << 20]]), cache=cache)


def test_cache_crop_forgets():
    _, model = pair(NANO)
    ids = torch.randint(512, (1, 8))
    with torch.no_grad():
        cache = Cache(NANO, 1, 16)
        model(ids, cache=cache)
        cache.crop(5)
        model(torch.randint(512, (1, 2)), cache=cache)
        cache.crop(5)
        again = model(ids[:, 5:], cache=cache)
        assert relative(again, model(ids)[:, 5:]) <= BOUND
    with pytest.raises(ValueError, match="length must be between 0 and 8"):
        cache.crop(9)
    ids, mask = torch.randint(512, (2, 8)), torch.tensor([[0] * 4 + [1] * 4, [1] * 8])
    with torch.no_grad():
        cache = Cache(NANO, 2, 16)
        model(ids, attention_mask=mask, cache=cache)
        cache.crop(0)  # also the padding
        assert relative(model(ids, cache=cache), model(ids)) <= BOUND


def test_no_look_ahead_and_logits_to_keep():
    _, model = pair(NANO)
    ids = torch.randint(512, (1, 20))
    changed = ids.clone()
    changed[0, 12] = (ids[0, 12] + 1) % 512
    with torch.no_grad():
        a, b = model(ids), model(changed)
        kept = model(ids, logits_to_keep=2)
    assert torch.equal(a[:, :12], b[:, :12])
    assert not torch.equal(a[:, 12], b[:, 12])
    assert relative(kept, a[:, -2:]) <= BOUND


def test_casting_keeps_rotary_tables():
    model = Phi1(NANO)
    tables = model.rotary_tables.clone()
    model.half()
    assert model.head.weight.dtype == torch.float16
    assert model.rotary_tables.dtype == torch.float32
    assert torch.equal(model.rotary_tables, tables)
    assert model(torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.float16


def test_dropout_depends_on_sample_not_on_row():
    config = preset("nano", vocab_size=512, num_hidden_layers=2, attention_dropout=0.1, residual_dropout=0.1)
    model = Phi1(config)
    ids = torch.randint(512, (3, 33))
    rng, samples = torch.tensor([7, 3]), torch.tensor([40, 41, 42])

    def total(rows, step=rng):
        return model.loss(ids[rows, :-1], ids[rows, 1:], reduction="sum", rng=step, sample_ids=samples[rows]).item()

    whole = total([0, 1, 2])
    assert whole == pytest.approx(total([2]) + total([0]) + total([1]), rel=1e-6)
    assert whole == pytest.approx(total([2, 1, 0]), rel=1e-6)
    assert abs(whole - total([0, 1, 2], torch.tensor([7, 4]))) > 1e-4 * whole
    with backend("reference"):
        assert whole == pytest.approx(total([0, 1, 2]), rel=1e-5)
    model.eval()
    assert total([0]) == pytest.approx(model.loss(ids[:1, :-1], ids[:1, 1:], reduction="sum").item(), rel=1e-6)
    model.train()
    with pytest.raises(ValueError, match=r"rng=\), an int64 tensor"):
        model.loss(ids[:, :-1], ids[:, 1:])
    with pytest.raises(ValueError, match=r"eval\(\) turns dropout \(attention 0.1, residual 0.1\) off"):
        model(ids)


def test_compiles_without_graph_breaks():
    config = preset("nano", vocab_size=256, num_hidden_layers=1, attention_dropout=0.1)
    model = Phi1(config)
    ids = torch.randint(256, (2, 17))
    rng, samples = torch.tensor([1, 2]), torch.tensor([5, 6])

    def loss(x, y):
        return model.loss(x, y, rng=rng, sample_ids=samples)

    want = loss(ids[:, :-1], ids[:, 1:])
    want.backward()
    gradient = model.blocks[0].in_proj.weight.grad.clone()
    model.zero_grad()
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(ids[:, :-1], ids[:, 1:])
    got.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    assert relative(model.blocks[0].in_proj.weight.grad, gradient) <= BOUND


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 3, dtype=torch.int64), logits_to_keep=-1), "logits_to_keep must be 0 or more"),
        (lambda m: m(torch.tensor([[512]])), r"token ids must be between 0 and 511; got 512"),
        (lambda m: m(torch.tensor([[3, -1]])), r"token ids must be between 0 and 511; got -1"),
        (lambda m: m(torch.zeros(1, 513, dtype=torch.int64)), "at most 512 tokens fit the model's context; got 513"),
        (lambda m: m(torch.zeros(4, dtype=torch.int64)), r"ids must be int64 \[B, T\]"),
        (lambda m: m(torch.zeros(1, 4)), r"ids must be int64 \[B, T\]; got torch.float32"),
        (lambda m: m(torch.zeros(1, 3, dtype=torch.int64), attention_mask=torch.tensor([[1, 0, 1]])), "left padding"),
        (lambda m: m(torch.zeros(1, 3, dtype=torch.int64), attention_mask=torch.ones(1, 2)), "attention_mask.shape"),
        (lambda m: m(torch.zeros(1, 3, dtype=torch.int64), cache=Cache(NANO, 1, 2)), "at most 2 tokens fit the cache"),
        (lambda m: m(torch.zeros(2, 3, dtype=torch.int64), cache=Cache(NANO, 1, 8)), "the cache's batch, 1; got 2"),
        (lambda m: Cache(NANO, 1, 513), "max_length must be between 1 and 512"),
        (lambda m: m.loss(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)), "targets.shape"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(Phi1(NANO).eval())


@pytest.mark.parametrize("shape", [(0, 3), (0, 0), (2, 0)])
def test_no_tokens_give_no_logits(shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    model = Phi1(TINY)
    assert model(ids).shape == (*shape, TINY.vocab_size)
    model.loss(ids, ids, reduction="sum").backward()
    assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize(("mask", "message"), [
    (torch.tensor([[0, 7, 7]]), "zeros then ones"), (torch.tensor([[1, 0, 1]]), "zeros then ones"),
    (torch.ones(1, 3, dtype=torch.complex64), "attention_mask must be bool"),
    (torch.ones(1, 2), r"shape must be \(1, 3\)"),
    (torch.ones(1, 3, device="meta"), "must be on ids's device"),
])
def test_masks_that_are_none_are_refused(mask, message):
    with pytest.raises(ValueError, match=f"Phi1: .*{message}"):
        Phi1(TINY)(torch.ones(1, 3, dtype=torch.int64), attention_mask=mask)


def test_ids_on_another_device_than_the_model_are_refused():
    cache = Cache(TINY, 1, 4)
    with pytest.raises(ValueError, match=r"Phi1: ids must be on the model's device \(cpu\); got meta"):
        Phi1(TINY)(torch.ones(1, 3, dtype=torch.int64, device="meta"), cache=cache)
    with pytest.raises(ValueError, match="Phi1: cache must be one of the model's own configuration"):
        Phi1(TINY)(torch.ones(1, 3, dtype=torch.int64), cache=Cache(preset("nano"), 1, 4))


def test_forward_mode_is_refused_by_the_whole_model():
    model = Phi1(TINY)
    parameters = dict(model.named_parameters())
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda p: torch.func.functional_call(model, p, (ids,)), (parameters,), (parameters,))
