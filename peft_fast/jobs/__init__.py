"""What the programs share (generation, training, demo): errors for their users, the device."""
