"""The feed-forward network that `distill` trains and `stylize` uses."""
