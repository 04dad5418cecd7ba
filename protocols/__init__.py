"""Who speaks when, what ends a turn, and who is paid what."""
