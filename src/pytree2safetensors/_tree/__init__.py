"""Names and trees: the grammar of key paths, and the trees that they describe."""
