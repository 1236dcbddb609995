"""The stored state of a run. Nothing here imports torch or ray."""
