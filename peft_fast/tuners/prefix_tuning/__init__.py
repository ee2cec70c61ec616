"""Prefix tuning: its configuration, so that PEFT's files and dictionaries are understood. The method comes later."""

from .config import PrefixTuningConfig

__all__ = ["PrefixTuningConfig"]
