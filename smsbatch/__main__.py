"""`python -m smsbatch`, the same as `smsbatch`."""

from smsbatch.cli import app

app(prog_name="smsbatch")
