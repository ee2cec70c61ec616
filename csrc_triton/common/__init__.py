"""What every family shares: the table of configurations, the ahead-of-time cases, dropout's bits, planes."""
