"""What fuse_lm_head refuses, by name and before a step."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test installs it)")

from tokenrl.integrations import hosts  # noqa: E402
from tokenrl.integrations.transformers import fuse_lm_head  # noqa: E402

SIZES = {
    "vocab_size": 29, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
IDS = torch.arange(5)[None]


def model_of(after=None, kind=transformers.Qwen2ForCausalLM):
    """A Qwen2 whose forward goes on with its logits as `after` does."""

    class Model(kind):
        def forward(self, input_ids, labels=None, **kwargs):
            logits = after(self, self.lm_head(self.model(input_ids=input_ids).last_hidden_state))
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    torch.manual_seed(0)
    return (kind if after is None else Model)(transformers.Qwen2Config(**SIZES))


def test_what_a_forward_may_do():
    """Scales before and after a softcap, casts, and what tanh is called."""
    model = model_of(lambda self, z: (0.5 * torch.tanh((3 * z).float() / 0.2) * 0.4).to(torch.float32).contiguous())
    model.lm_head.weight.data.mul_(20)
    expected = model(IDS, labels=IDS).loss
    truth = torch.autograd.grad(expected, list(model.parameters()))
    fuse_lm_head(model)
    found = model(IDS, labels=IDS).loss
    torch.testing.assert_close(found, expected)
    for x, y in zip(torch.autograd.grad(found, list(model.parameters())), truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6 * y.abs().max().item())


def put(self, logits):
    logits[..., 3] = -1e9
    return logits


FORWARDS = {
    "a product with a torch.Tensor": lambda self, z: z * torch.ones(()),
    "a product with a torch.nn.parameter.Parameter": lambda self, z: z / self.model.norm.weight[:1].sum(),
    "a second tanh": lambda self, z: z.tanh().tanh(),
    "torch.add": lambda self, z: torch.ones(29) + z,
    "torch.softmax": lambda self, z: torch.softmax(z, -1),
    "an index": lambda self, z: z[..., :20],
    "an index, a sum": put,
    "a sum": lambda self, z: z + 1,
    "shape": lambda self, z: z * (z.shape[-1] > 3),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_what_else_a_forward_does_to_its_logits(name):
    model = model_of(FORWARDS[name])
    fuse_lm_head(model)
    said = "a product" if "product" in name else "an index, a sum" if "index" in name or "a sum" in name else name
    with pytest.raises(ValueError, match=f"^logits of a fused lm_head: got {said}"):
        model(IDS, labels=IDS)
    assert isinstance(model.lm_head, torch.nn.Linear) and "_loss_function" not in vars(model)


def test_forwards_that_score_otherwise():
    def twice(self, z):
        self.loss_function(z, IDS, 29)
        return z

    def own_head(self, z):
        return torch.nn.functional.linear(z.hidden, self.lm_head.weight)

    for after, said in ((twice, "several losses"), (own_head, "logits that are not its head's")):
        model = model_of(after)
        fuse_lm_head(model)
        with pytest.raises(ValueError, match=f"^model: got Model, a forward with {said}"):
            model(IDS, labels=IDS)
    model = model_of()
    model.forward = lambda input_ids, labels: model.model(input_ids)
    fuse_lm_head(model)
    with pytest.raises(ValueError, match="^model: got Qwen2ForCausalLM, a forward without a call of its loss_function"):
        model(IDS, labels=IDS)
    model = model_of()
    fuse_lm_head(model)
    with pytest.raises(ValueError, match="^return_dict: got False"):
        model(IDS, labels=IDS, return_dict=False)


class Quantized(torch.nn.Linear):
    def forward(self, x):
        return x


def with_head(head):
    model = model_of()
    model.lm_head = head
    return model


def with_loss():
    model = model_of()
    model.loss_function = torch.nn.functional.cross_entropy
    return model


def partitioned():
    model = model_of()
    model.lm_head.weight.ds_status = "NOT_AVAILABLE"
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.nn.Linear(2, 2), "model: got Linear, which has no get_output_embeddings"),
        (lambda: model_of().model, "model: got Qwen2Model, which has no"),
        (with_loss, "model: got Qwen2ForCausalLM with the loss cross_entropy, accepted: ForCausalLMLoss"),
        (lambda: with_head(Quantized(16, 29)), "lm_head: got a Quantized, accepted: torch.nn.Linear"),
        (lambda: with_head(torch.nn.Linear(16, 29, dtype=torch.complex64)), "lm_head.weight: got dtype"),
        (partitioned, "lm_head.weight: got a partition of DeepSpeed's ZeRO-3"),
    ],
)
def test_models(make, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        fuse_lm_head(make())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": torch.ones(3)}, "temperature: got"),
        ({"outputs": ["log_probs"]}, "outputs: got 'log_probs'.*Did you mean"),
        ({"compute_dtype": torch.int8}, "compute_dtype: got torch.int8"),
        ({"memory_budget": -1}, "memory_budget: got -1"),
        ({"backend": "gpu"}, "backend: got 'gpu'"),
    ],
    ids=str,
)
def test_arguments(options, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        fuse_lm_head(model_of(), **options)


def test_the_heads_of_trl_and_verl_refuse_a_partition_too():
    pytest.importorskip("trl", reason="trl is not installed (make test installs it)")
    from tokenrl.integrations.trl.head import ChunkedLogProb
    from tokenrl.integrations.verl.head import head

    weight = torch.nn.Parameter(torch.ones(7, 4))
    hidden, ids = torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)
    calls = (lambda: ChunkedLogProb.apply(hidden, weight, None, ids, 1.0, 1), lambda: head(hidden, weight, ids, 1.0))
    for call in calls:
        call()
    weight.ds_status = "NOT_AVAILABLE"
    for call in calls:
        with pytest.raises(ValueError, match="^lm_head.weight: got a partition of DeepSpeed's ZeRO-3"):
            call()


def test_versions(monkeypatch):
    monkeypatch.setattr(hosts, "version_of", lambda name: "4.45.0")
    with pytest.raises(ImportError, match="^transformers: got 4.45.0, accepted: transformers 4.50.3 to 5.24.0"):
        hosts.require("transformers")
