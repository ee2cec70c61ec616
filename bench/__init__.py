"""Measurements: ``python -m bench aot | run | report``. Not part of the wheel."""
