"""Towers: what makes states of pictures and of sounds, and how these are cut and scaled for it."""
