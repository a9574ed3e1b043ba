"""The demo's policy, a small Llama with random weights, and a batched sampling loop."""

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from . import task


def build(seed: int, device: torch.device) -> LlamaForCausalLM:
    """A two-layer Llama over the task's characters; the seed decides its weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(task.CHARACTERS), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=task.PROMPT_LENGTH + task.RESPONSE_LENGTH,
        bos_token_id=None, eos_token_id=task.END, pad_token_id=task.BLANK,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device)


def response_logits(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """fp32 [B, T, V], a view: logits[:, t] predicts response token t of tokens [B, PROMPT_LENGTH + T]."""
    width = tokens.shape[1] - task.PROMPT_LENGTH
    return model(input_ids=tokens, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]


@torch.no_grad()
def sample(
    model: LlamaForCausalLM, prompts: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Responses int64 [B, RESPONSE_LENGTH] to prompts [B, PROMPT_LENGTH], and their mask, bool: up to and with the end.

    Without a generator the likeliest character is taken.
    """
    responses = prompts.new_full((len(prompts), task.RESPONSE_LENGTH), task.BLANK)
    mask = torch.zeros_like(responses, dtype=torch.bool)
    running = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    cache, inputs = DynamicCache(), prompts
    for t in range(task.RESPONSE_LENGTH):
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        chosen = logits.argmax(-1)
        if generator is not None:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
        responses[:, t] = torch.where(running, chosen, task.BLANK)
        mask[:, t] = running
        running = running & (chosen != task.END)
        if not running.any():
            break
        inputs = responses[:, t : t + 1]
    return responses, mask
