"""HTTP: one file per endpoint, read top to bottom; docs/architecture.md names what they share.

The endpoints of batch jobs, and what only they share, are in `jobs`.
"""
