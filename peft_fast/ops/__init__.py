"""Operators: schema, fake, autograd and the choice of implementation. Public functions are in ``functional``."""
