"""What `peft-fast demo` does: four LoRA adapters and a prefix for a small model that comes with the package (assets)."""
