"""One file an experiment: its claim, and only its differences from the defaults."""
