"""Training an adapter from a file of examples: `peft-fast train`, and the same from Python."""
