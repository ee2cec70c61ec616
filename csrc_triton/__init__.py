"""Triton device code: kernels with their launchers beside them. Imports torch and triton only; knows tensors, never modules."""
