"""This folder is on PYTHONPATH of the processes that a program running with peft_fast as peft starts."""
