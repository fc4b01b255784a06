"""Triton kernels for GPUs: the same functions as in the parent folder, one launch or a few for each."""
