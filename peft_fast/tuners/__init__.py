"""The methods: one folder or file each, on the base classes of `tuners_utils`."""
