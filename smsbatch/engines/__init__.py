"""Pictures in, pictures out: a file per method."""
