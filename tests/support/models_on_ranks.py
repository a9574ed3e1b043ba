"""Models of transformers on tensor-parallel ranks, their head by TRL's hook and by fuse_lm_head."""

import torch
from rank_numbers import generator, held, weighed

VOCABULARY, WIDTH = 22, 8


def tiny_model():
    """A head of an odd number of rows, of its own."""
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY + 1, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(config).double()


def trl_head(group):
    """TRL's fused head (trl.trainer.utils.add_fused_lm_head) whose weight is sharded over the ranks of a mesh's "tp"
    dimension: TRL gathers it, each rank computes its own rows, of which there are not as many on each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from trl.trainer.utils import add_fused_lm_head

    from tokenrl import wire
    from tokenrl.integrations.trl import patch_trl_head, unpatch_trl_head

    labels = torch.randint(VOCABULARY, (2, 7), generator=generator())

    def run(model, ids):
        out = model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False)
        weighed(out.log_probs, out.entropy).backward()
        return out.log_probs.detach(), out.entropy.detach(), model.model.embed_tokens.weight.grad

    whole = tiny_model()
    rows = whole(input_ids=labels, use_cache=False).logits[:, :-1].log_softmax(-1)
    logp, entropy = rows.gather(-1, labels[:, 1:, None])[..., 0], -(rows.exp() * rows).sum(-1)
    weighed(logp, entropy).backward()
    truth = logp.detach(), entropy.detach(), whole.model.embed_tokens.weight.grad
    patch_trl_head()
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        model = tiny_model()
        model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        with wire.counted() as sent:
            found = run(model, labels)
        held(truth, found)
        held((whole.lm_head.weight.grad,), (model.lm_head.weight.grad.full_tensor(),))
        assert [kind for kind, _ in sent] == ["all_gather", "all_gather", "all_reduce"], sent
    finally:
        unpatch_trl_head()


def fused_model(group):
    """fuse_lm_head on a model that transformers has made tensor-parallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    from tokenrl.integrations.transformers import fuse_lm_head

    labels = torch.randint(VOCABULARY, (2, 7), generator=generator())
    whole, ours = models = tiny_model(), tiny_model()
    plan = {name.replace("*", "0"): style for name, style in ours.tp_plan.items()}
    plan |= {
        name: plan[name.rpartition(".")[0]] for name, _ in ours.named_parameters() if name.rpartition(".")[0] in plan
    }
    apply_tensor_parallelism(ours, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), plan)
    assert ours.lm_head.weight.to_local().shape[0] < VOCABULARY
    fuse_lm_head(ours)
    found = ours(input_ids=labels, labels=labels, use_cache=False)
    rows = whole(input_ids=labels, use_cache=False).logits[:, :-1].log_softmax(-1)
    logp = rows.gather(-1, labels[:, 1:, None])[..., 0]
    loss = -logp.mean()  # transformers' own is in fp32
    held((loss.detach(), logp.detach()), (found.loss.detach(), found.logp[:, :-1].detach()))
    loss.backward(), found.loss.backward()
    grads = [
        [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]
        for model in models
    ]
    held(*grads)
