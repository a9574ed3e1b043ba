"""Per-token statistics of the vocabulary, from logits or from hidden states."""
