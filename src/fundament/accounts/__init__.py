"""Who calls, what they may, what it costs and what they used; without HTTP."""
