"""Workers, which process the units of a run, and the pools that feed them."""
