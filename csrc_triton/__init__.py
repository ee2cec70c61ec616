"""Triton device code: kernels with their launchers. Imports torch and triton only; knows tensors, never modules."""
