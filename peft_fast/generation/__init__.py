"""Answering a file of requests, each with an adapter of its own: `peft-fast generate`, and the same from Python."""
