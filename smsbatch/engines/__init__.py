"""The engines, which stylize pictures: one file per method."""
