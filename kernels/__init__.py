"""Scans that hand out their states, and implicit-attention tiles, on plain tensors."""
