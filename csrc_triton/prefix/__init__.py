"""Attention with a learned prefix as a second source of keys and values."""
