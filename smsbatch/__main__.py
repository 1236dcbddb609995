"""`python -m smsbatch`, the same as `smsbatch`."""

from smsbatch.cli.app import app

app(prog_name="smsbatch")
