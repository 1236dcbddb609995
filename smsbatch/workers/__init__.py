"""Who does a unit of a run."""
