"""Which class lives where, collectives with their gradients, and the start of a process group."""
