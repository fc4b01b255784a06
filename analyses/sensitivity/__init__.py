"""What a model can do without: which parts, layers and tokens, and how its tensors and its loss surface are shaped."""
