"""Every operator in plain torch: the oracle of the tests, and what runs on a CPU.

Nothing here knows a kernel, a module or a configuration. cpu says what this machine's CPU is fast at.
"""
