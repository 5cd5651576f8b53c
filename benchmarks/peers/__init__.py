"""The peers: what each runs in its own environment, and the versions it is made of."""
