"""Prefix tuning: learned keys and values before those of the text, in every layer. Li and Liang 2021."""

from .config import PrefixTuningConfig
from .model import PrefixEncoder

__all__ = ["PrefixEncoder", "PrefixTuningConfig"]
