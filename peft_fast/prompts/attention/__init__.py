"""Attention that reads a learned prefix: which architectures, how it gets there, and the way through the cache."""

from .cached import filled_cache
from .interface import give_back, install
from .prefix import PrefixCall, check_positions
from .table import DoesNotFit, fit_sizes, prefix_layers

__all__ = [
    "DoesNotFit",
    "PrefixCall",
    "check_positions",
    "filled_cache",
    "fit_sizes",
    "give_back",
    "install",
    "prefix_layers",
]
