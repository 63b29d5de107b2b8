"""What survives a restart: one file per table, each owning its statements."""
