"""What else one paper brings, a file per paper: bounds, weights, masks and scores of tokens."""
