"""The command: it shows, compares and verifies files."""
