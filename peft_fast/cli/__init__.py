"""The `peft-fast` command: demo, info, check."""
