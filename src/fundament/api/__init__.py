"""HTTP: one file per endpoint, read top to bottom; what they share is in `body`, `errors`, `state` and `wire`.

The endpoints of batch jobs, and what only they share, are in `jobs`.
"""
