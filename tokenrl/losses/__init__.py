"""What a trainer calls: the losses, and the parts that a loss written by hand is made of."""
