"""Model id and call in, result out: which models stay in memory, which rows go together, the threads that run them."""
