"""The command: what is in a file, how two differ, and whether one is sound."""
