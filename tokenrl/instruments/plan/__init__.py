"""What a loss head costs, from a model of bytes, flops and launches: `tokenrl plan`."""
