"""A batch in which every row has its own adapter, or none."""
