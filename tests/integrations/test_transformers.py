"""fuse_lm_head: causal LMs of transformers with it and without, alone and in the real Trainer."""

import copy
import inspect
import math
import tempfile
import warnings

import pytest
import torch

pytest.importorskip("trl", reason="transformers with accelerate, peft and datasets come with trl (make test)")

import transformers
from accelerate import dispatch_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from bench.measure import peak_memory
from bench.trl_world import MODELS, SIZES, compared, made_model, tokenizer
from tokenrl import token_logprobs
from tokenrl.integrations.transformers import call, fuse_lm_head, unfuse_lm_head
from tokenrl.logprobs.from_logits import OUTPUTS

PHI = {name: SIZES[name] for name in SIZES if name != "num_key_value_heads"} | {"resid_pdrop": 0.0}
MORE = {
    "phi, bias": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**PHI)),
    "granite, logits_scaling": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**SIZES, logits_scaling=0.5)
    ),
    "recurrent gemma, logits_soft_cap": lambda: transformers.RecurrentGemmaForCausalLM(
        transformers.RecurrentGemmaConfig(
            **{**SIZES, "num_hidden_layers": 3}, head_dim=8, lru_width=32, logits_soft_cap=0.7
        )
    ),
}


def model_of(kind, dtype=torch.float32):
    """Its logits are of the size of a trained model's, so that softcaps bend them."""
    torch.manual_seed(0)
    model = (made_model(kind) if kind in MODELS else MORE[kind]()).to(dtype)
    if "mixtral" in kind:
        model.set_experts_implementation("eager")  # the other has no fp64
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(20)
        if head.bias is not None:
            head.bias.normal_()
    return model


def batch(rows=3, length=8):
    g = torch.Generator().manual_seed(5)
    ids = torch.randint(3, SIZES["vocab_size"], (rows, length), generator=g)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape, generator=g) < 0.3, -100)}


def gradients(model, loss):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def near(found, expected, rel=1e-5):
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert (x - y).abs().max() <= rel * y.abs().max() + 1e-12


def own_statistics(logits, labels, temperature):
    """logp and entropy [B, T] of a model's own logits; zeros where there is no label."""
    logp = (logits / temperature).log_softmax(-1)
    ids = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    chosen = logp.gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    return [torch.where(ids == -100, 0, x) for x in (chosen, -(logp.exp() * logp).sum(-1))]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", [*MODELS, *MORE])
def test_statistics_and_loss_are_the_model_s_own(kind, temperature):
    model, inputs = model_of(kind, torch.float64), batch()
    own = model(**inputs)
    expected = own_statistics(own.logits, inputs["labels"], temperature)
    g = torch.Generator().manual_seed(6)
    weights = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in expected]
    truth = gradients(model, sum((x * w).sum() for x, w in zip(expected, weights, strict=True)))
    fuse_lm_head(model, temperature=temperature)
    out = model(**inputs)
    found = [out.logp, out.entropy]
    near(found, expected, 1e-12)
    near(gradients(model, sum((x * w).sum() for x, w in zip(found, weights, strict=True))), truth, 1e-10)
    assert out.logits is None and isinstance(out, type(own))
    assert set(out) == set(own) - {"logits"} | {"logp", "entropy"}
    if temperature == 1:  # the model's own loss is fp32
        torch.testing.assert_close(out.loss.double(), own.loss.double(), rtol=1e-6, atol=0)


def test_every_output():
    model, inputs = model_of("gemma2, softcap"), batch()
    logits, ids = model(**inputs).logits.detach(), inputs["labels"].roll(-1, -1)
    ids[:, -1] = -100
    fuse_lm_head(model, outputs=OUTPUTS)
    out = model(**inputs)
    for name, expected in zip(OUTPUTS, token_logprobs(logits, ids, outputs=OUTPUTS), strict=True):
        torch.testing.assert_close(out[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)], ids=str)
def test_labels_that_are_shifted_already(items):
    model, inputs = model_of("qwen2"), batch()
    labels, ids = inputs["labels"], inputs["input_ids"]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = model(ids, labels=labels, num_items_in_batch=items).loss
    truth = gradients(model, expected)
    fuse_lm_head(model)
    for given in ({"labels": labels}, {"shift_labels": shifted}, {"labels": labels.flip(1), "shift_labels": shifted}):
        found = model(ids, **given, num_items_in_batch=items).loss
        torch.testing.assert_close(found, expected)
        near(gradients(model, found), truth)
    names = list(inspect.signature(model.forward).parameters)
    by_place = [ids, *(None for _ in names[1 : names.index("labels")]), labels]
    torch.testing.assert_close(model(*by_place, num_items_in_batch=items).loss, expected)


def test_no_label_at_all():
    model = model_of("qwen2")
    fuse_lm_head(model)
    loss = model(batch()["input_ids"], labels=torch.full((3, 8), -100)).loss
    assert loss == 0 and not any(x.any() for x in gradients(model, loss))


def run(kind, fused, **options):
    g = torch.Generator().manual_seed(7)
    rows = [batch(1, length) for length in torch.randint(4, 12, (32,), generator=g).tolist()]
    data = Dataset.from_list([{name: x[0].tolist() for name, x in row.items()} for row in rows])
    model = model_of(kind)
    if fused:
        fuse_lm_head(model)
    args = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="tokenrl-world-"), max_steps=6, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, learning_rate=3e-3, logging_steps=1, report_to=[], save_strategy="no", seed=3,
        use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", eval_strategy="steps", eval_steps=3,
        prediction_loss_only=True, **options,
    )  # fmt: skip
    collator = transformers.DataCollatorForSeq2Seq(tokenizer(), model=None)
    made = transformers.Trainer(model, args, collator, data, eval_dataset=data.select(range(8)))
    made.train()
    return made


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("kind", MODELS)
def test_trainer(kind, optimizer):
    """Adam magnifies the rounding of gradients that are nearly zero, plain descent does not."""
    theirs, ours = (run(kind, fused, optim=optimizer) for fused in (False, True))
    compared(theirs, ours)
    assert "eval_loss" in ours.state.log_history[3]
    for p, q in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-5 if optimizer == "sgd" else 1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2, softcap", "cohere, logit_scale"])
def test_autocast_is_followed(kind, monkeypatch):
    """The head computes in bf16, as the model's own does, and errs no more than that and a rounding."""
    seen, real = [], call.linear_token_logprobs
    monkeypatch.setattr(
        call, "linear_token_logprobs", lambda *args, **more: seen.append(more["compute_dtype"]) or real(*args, **more)
    )
    model, inputs = model_of(kind), batch()
    exact = copy.deepcopy(model).double()
    truth = (loss := exact(**inputs).loss).detach(), *gradients(exact, loss)
    found = []
    for fused in (False, True):
        if fused:
            fuse_lm_head(model)
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("error")
            loss = model(**inputs).loss
        found.append((loss.detach(), *gradients(model, loss)))
    theirs, ours = ([(x - t).double().norm() / t.norm() for x, t in zip(y, truth, strict=True)] for y in found)
    assert seen == [torch.bfloat16]
    assert all(x <= 1.5 * y + 4e-3 for x, y in zip(ours, theirs, strict=True)), (ours, theirs)
    fuse_lm_head(model, compute_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        model(**inputs)
    assert seen[1:] == [torch.float32]


def test_no_logits():
    rows, length, vocab, budget = 4, 65, 4000, 1 << 20
    model = made_model("qwen2", vocab_size=vocab, max_position_embeddings=length)
    ids = torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(5))
    weights = 3 * sum(p.nbytes for p in model.parameters())

    def step():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()

    logits = rows * length * vocab * 4
    assert peak_memory(step, "cpu") > 2 * logits
    fuse_lm_head(model, memory_budget=budget)
    assert peak_memory(step, "cpu") < logits < logits + weights


def adapted(model, **options):
    torch.manual_seed(1)
    found = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options))
    return found.eval()  # no dropout of adapters


@pytest.mark.parametrize("when", ["before", "after"])
def test_peft(when):
    inputs = batch()
    own = adapted(model_of("qwen2"), target_modules=["q_proj"])
    expected = own(**inputs).loss
    model = model_of("qwen2")
    if when == "before":
        fuse_lm_head(model)
    model = adapted(model, target_modules=["q_proj"])
    if when == "after":
        fuse_lm_head(model)
    out = model(**inputs)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected)
    near(gradients(model, out.loss), gradients(own, expected))


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_an_adapter_of_the_head_is_refused(options):
    options = {"target_modules": ["q_proj"]} | options
    with pytest.raises(ValueError, match=r"^lm_head: got a PEFT adapter"):
        fuse_lm_head(adapted(model_of("qwen2"), **options))
    model = model_of("qwen2")
    fuse_lm_head(model)
    model = adapted(model, **options)
    with pytest.raises(ValueError, match=r"^lm_head: got a PEFT adapter"):
        model(**batch())


def test_again_and_undone():
    model, inputs = model_of("qwen2"), batch()
    own, forward = model(**inputs), model.forward
    for temperature in (2.0, 1.0):
        fuse_lm_head(model, temperature=temperature, outputs=["entropy"])
    torch.testing.assert_close(model(**inputs).loss, own.loss)
    torch.testing.assert_close(model(inputs["input_ids"]).logits, own.logits)
    twin = copy.deepcopy(model)
    twin.lm_head.weight.data.zero_()
    assert twin(**inputs).entropy.max().item() == pytest.approx(math.log(SIZES["vocab_size"]))
    ids = inputs["input_ids"]
    model.generation_config.eos_token_id = None
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    for _ in range(2):
        unfuse_lm_head(model)
    assert model.forward == forward and not [name for name in vars(model) if "tokenrl" in name]
    assert torch.equal(generated, model.generate(ids, max_new_tokens=3, do_sample=False))
    torch.testing.assert_close(model(**inputs).logits, own.logits)


def test_undone_beneath_another_wrapper():
    model, inputs = model_of("qwen2"), batch()
    fuse_lm_head(model)
    fused = model.forward
    model.forward = lambda *args, **more: fused(*args, **more)
    unfuse_lm_head(model)
    assert model(**inputs).logits is not None
    fuse_lm_head(model)
    assert model(**inputs).logits is None


def test_under_hooks_of_a_device_map_and_compiled():
    model, inputs = model_of("qwen2"), batch()
    del model.model.layers[1:]
    expected = model(**inputs).loss
    truth = gradients(model, expected)
    fuse_lm_head(model)
    compiled = torch.compile(model, backend="aot_eager")
    dispatched = copy.deepcopy(model)
    calls = []
    dispatch_model(dispatched, {"": "cpu"}, main_device="cpu", force_hooks=True)
    hook = dispatched.lm_head._hf_hook
    hooked = hook.pre_forward
    hook.pre_forward = lambda *args, **more: calls.append(1) or hooked(*args, **more)
    for made in (compiled, dispatched):
        loss = made(**inputs).loss
        torch.testing.assert_close(loss, expected)
        near(gradients(made, loss), truth)
    assert calls == [1]
