"""Phi models of transformers with our operations, beside the same models without."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM, PhiModel, StaticCache

import phi1
from phi1.integrations import patch as module

SHAPE = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0, "resid_pdrop": 0.0, "partial_rotary_factor": 0.5}
IDS = torch.randint(3, 300, (3, 20), generator=torch.Generator().manual_seed(1))


def build(kind=PhiForCausalLM, **changes):
    torch.manual_seed(0)
    return kind(PhiConfig(**SHAPE | changes)).eval()


@pytest.fixture(scope="module")
def original():
    return build()


@pytest.fixture(params=[False, True], ids=["plain", "merged"])
def patched(original, request):
    return phi1.patch(copy.deepcopy(original), merge=request.param)


def mask(*zeros):
    found = torch.ones_like(IDS)
    for row, part in zeros:
        found[row, part] = 0
    return found


def gradients(model, **inputs):
    model.zero_grad()
    out = model(IDS, labels=IDS, **inputs)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("padding", [mask(), mask((0, slice(5)), (2, slice(1))), mask((1, slice(15, 20)))],
                         ids=["none", "left", "right"])
def test_logits_of_real_tokens_are_equal(original, patched, padding):
    expected, got = original(IDS, attention_mask=padding).logits, patched(IDS, attention_mask=padding).logits
    torch.testing.assert_close(got[padding.bool()], expected[padding.bool()])


def test_packed_rows_see_their_own_document(original, patched):
    positions = torch.tensor([[*range(7), *range(13)]]).expand(3, -1)
    expected = original(IDS, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(patched(IDS, position_ids=positions, use_cache=False).logits, expected)
    assert (expected - original(IDS).logits).abs().max() > 0.1  # the documents matter


def test_generation_is_equal(original, patched):
    for inputs in ({"num_beams": 2}, {"attention_mask": mask((0, slice(5)))}):
        chosen = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **inputs}
        assert torch.equal(patched.generate(IDS, **chosen), original.generate(IDS, **chosen))


@pytest.mark.parametrize("items", [None, 40])
def test_loss_and_every_gradient_are_equal_without_logits(original, items):
    expected, theirs = gradients(copy.deepcopy(original).train(), num_items_in_batch=items)
    got, ours = gradients(phi1.patch(copy.deepcopy(original)).train(), num_items_in_batch=items)
    assert got.logits is None
    assert got.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_finetuning_gives_the_same_losses():
    models = [build(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1).train()
              for _ in range(3)]
    phi1.patch(models[1])
    phi1.patch(models[2], merge=True)
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        losses.append([])
        for step in range(100):
            ids = torch.randint(3, 40, (2, 16), generator=torch.Generator().manual_seed(step))
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][-1] < losses[0][0] - 1
    for ours in losses[1:]:
        assert ours == pytest.approx(losses[0], abs=1e-3)


@pytest.mark.parametrize("merge", [False, True])
def test_checkpointing_repeats_the_masks_of_dropout(merge):
    model = phi1.patch(build(resid_pdrop=0.3, attention_dropout=0.2), merge=merge).train()
    torch.manual_seed(5)
    whole, expected = gradients(model)
    model.gradient_checkpointing_enable()
    torch.manual_seed(5)
    again, got = gradients(model)
    assert again.loss == whole.loss != build().train()(IDS, labels=IDS).loss
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_it_compiles_in_one_graph(patched):
    expected = patched.train()(IDS, labels=IDS).loss
    got = torch.compile(patched, backend="aot_eager", fullgraph=True)(IDS, labels=IDS).loss
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("context", ["autocast", "bfloat16"])
def test_bfloat16_is_no_further_from_float32(original, patched, context):
    exact = original(IDS).logits
    if context == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            theirs, ours = original(IDS).logits, patched(IDS).logits
    else:
        theirs, ours = copy.deepcopy(original).bfloat16()(IDS).logits, patched.bfloat16()(IDS).logits
    assert (ours - exact).abs().max() < 1.5 * (theirs - exact).abs().max()


def test_the_state_dict_is_hugging_faces_before_and_after(original, patched, tmp_path):
    state = original.state_dict()

    def equal(other):
        return list(other) == list(state) and all(torch.equal(other[name], state[name]) for name in state)

    assert equal(patched.state_dict())
    assert equal(pickle.loads(pickle.dumps(patched)).state_dict())
    patched.save_pretrained(tmp_path)
    assert equal(PhiForCausalLM.from_pretrained(tmp_path).state_dict())
    patched.load_state_dict({name: torch.zeros_like(x) for name, x in state.items()})
    assert not any(x.any() for x in patched.state_dict().values())
    patched.load_state_dict(state)
    phi1.unpatch(patched)
    assert equal(patched.state_dict())
    assert [(name, type(part)) for name, part in patched.named_modules()] == \
        [(name, type(part)) for name, part in original.named_modules()]
    assert torch.equal(patched(IDS).logits, original(IDS).logits)


def test_adapters_before_and_after_the_patch(original):
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
                      init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(original), lora)
    expected = model(IDS).logits
    torch.testing.assert_close(phi1.patch(model)(IDS).logits, expected)
    model.train()(IDS, labels=IDS).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    torch.manual_seed(1)
    torch.testing.assert_close(get_peft_model(phi1.patch(copy.deepcopy(original)), lora)(IDS).logits, expected)


def test_every_new_model_is_patched_until_it_is_undone(original):
    phi1.patch_transformers()
    try:
        model = build()
        with pytest.raises(ValueError, match="patched already"):
            phi1.patch_transformers()
        with pytest.raises(ValueError, match="hidden_act must be 'gelu_new'; got 'silu'"):
            build(hidden_act="silu")
    finally:
        phi1.unpatch_transformers()
    assert type(model) is module.OURS[PhiForCausalLM]
    torch.testing.assert_close(model(IDS).logits, original(IDS).logits)
    assert type(build(PhiModel)) is PhiModel
    with pytest.raises(ValueError, match="not patched"):
        phi1.unpatch_transformers()


@pytest.mark.parametrize(("kind", "call", "error", "message"), [
    (PhiModel, lambda m: phi1.patch(phi1.patch(m)), ValueError, "patched already"),
    (PhiModel, phi1.unpatch, ValueError, "phi1.unpatch: the model is not patched"),
    (PhiModel, lambda m: phi1.patch(m.layers[0].mlp), ValueError, "must be a Phi model of transformers .*; got PhiMLP"),
    (PhiModel, lambda m: phi1.patch("microsoft/phi-1"), TypeError, "must be a model of transformers; got str"),
    (PhiForCausalLM, lambda m: phi1.patch(get_peft_model(m, LoraConfig(target_modules=["fc1"])), merge=True),
     ValueError, "merge before adapters"),
], ids=["twice", "not patched", "no model inside", "a name", "adapters"])
def test_wrong_use_is_one_line_and_changes_nothing(kind, call, error, message):
    with pytest.raises(error, match=message):
        call(build(kind))


@pytest.mark.parametrize("changes", [{"qk_layernorm": True}, {"hidden_act": "relu"},
                                     {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4,
                                                          "partial_rotary_factor": 0.5}}], ids=lambda c: next(iter(c)))
def test_a_configuration_that_we_lack_is_refused(changes):
    with pytest.raises(ValueError, match=r"phi1\.patch: the model's"):
        phi1.patch(build(**changes))


def test_an_untested_version_is_refused(original, monkeypatch):
    monkeypatch.setattr(module, "version", lambda name: "4.40.0")
    with pytest.raises(ValueError, match=r"tested with transformers 5\.23; got 4\.40\.0"):
        phi1.patch(copy.deepcopy(original))


def llama(**changes):
    phi1.register_attention()
    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, **changes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ours = copy.deepcopy(model)
    ours.set_attn_implementation("phi1")
    return model, ours


def test_attention_serves_other_models_and_shared_heads():
    theirs, ours = llama()
    padding = mask((1, slice(4)))
    torch.testing.assert_close(ours(IDS, attention_mask=padding).logits[padding.bool()],
                               theirs(IDS, attention_mask=padding).logits[padding.bool()])


@pytest.mark.parametrize(("inputs", "message"), [
    ({"attention_mask": mask((0, slice(5, 7)))}, "before the tokens of a row or behind them, not between"),
    ({"attention_mask": torch.ones(3, 1, 20, 20).tril()}, "not a mask of 4 dimensions"),
    ({"past_key_values": "static"}, "needs a cache that grows"),
], ids=["a hole", "4 dimensions", "a static cache"])
def test_what_attention_lacks_is_refused(inputs, message):
    _, ours = llama()
    if inputs.get("past_key_values"):
        inputs = {"past_key_values": StaticCache(ours.config, max_cache_len=64)}
    with pytest.raises(ValueError, match=message):
        ours(IDS, **inputs)
