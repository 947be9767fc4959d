"""File contents, without I/O: header, note, digests, index."""
