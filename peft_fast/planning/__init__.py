"""The model of costs: memory and time of a step by arithmetic, without torch. `peft-fast plan` prints it."""
