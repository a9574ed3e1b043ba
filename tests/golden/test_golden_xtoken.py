"""X-Token against outputs of NeMo-RL (tests/golden)."""

import pytest
import torch
from golden_data import INDEX, arrays, near

from tokenrl.methods import xtoken

VOCAB = 17


@pytest.mark.parametrize("case", INDEX["nemo_rl_xtoken"]["cases"])
def test_nemo_rl(case):
    """Its chunks of each row of the batch are spans of their own here; two columns of the teacher's are padding."""
    x, config = arrays("nemo_rl_xtoken", case), INDEX["nemo_rl_xtoken"]["cases"][case]["config"]
    logits, teacher = x["student_logits"].requires_grad_(), x["teacher_logits"]
    batch, chunks = x["pair_valid"].shape
    offset = torch.arange(batch)[:, None] * chunks
    pays = torch.cat([x["pair_valid"].flatten(), torch.tensor([False])])
    spans = [torch.where(s >= 0, s + offset, -1).flatten() for s in (x["student_spans"], x["teacher_spans"])]
    spans = [torch.where(pays[s], s, -1) for s in spans]
    ids, weights = x["projection_ids"], x["projection_weights"]
    how = {"kind": "reverse_kl" if config["reverse_kl"] else "forward_kl", "temperature": config["temperature"]}
    if config["loss"] == "p_kl":
        projection = xtoken.sparse_projection(ids, weights, VOCAB)
        how["most"] = config.get("vocab_topk", 8192)
        rows = logits.flatten(0, 1), teacher.flatten(0, 1)
        values, valid = xtoken.p_kl(*rows, *spans, batch * chunks, projection, **how)
    else:
        pair = xtoken.matched_ids(ids, weights, VOCAB, match="strict" if config["loss"] == "gold" else "relaxed")
        assert torch.equal(pair[0], x["common_student"]) and torch.equal(pair[1], x["common_teacher"])
        how["most"] = config.get("uncommon_topk", 8192)
        rows = logits.flatten(0, 1), teacher[..., :VOCAB].flatten(0, 1)
        values, valid = xtoken.h_kl(*rows, *spans, batch * chunks, *pair, **how)
    loss = values[valid].mean()
    near(loss, x["loss"], "loss")
    near(torch.autograd.grad(loss, logits)[0], x["grad_student_logits"], "gradient")
