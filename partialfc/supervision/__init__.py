"""What keeps a run of many ranks honest: signals to stop, errors that all ranks share, hangs, and a look around first.

Nothing is imported here: `signals` and `exit_codes` need the standard library alone, and are in place before torch is.
"""
