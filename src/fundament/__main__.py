"""`python -m fundament` is the `fundament` command."""

from fundament.cli import app

app()
