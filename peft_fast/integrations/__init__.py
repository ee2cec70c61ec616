"""How peft_fast gets into programs that were not written for it. Imported by its own modules' names."""
