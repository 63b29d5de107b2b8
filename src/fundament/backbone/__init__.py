"""The packed transformer and what it is built from. Torch lives here and in the families, nowhere above."""
