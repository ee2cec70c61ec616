"""What `peft-fast demo` does: four LoRA adapters and a prefix for a small model that comes with the package.

The model is in assets/base; examples/train_base.py made it.
"""
