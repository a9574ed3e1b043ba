"""Who computes it: the ops, their backends, and the choice between them."""
