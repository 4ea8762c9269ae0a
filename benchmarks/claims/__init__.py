"""One module for each paper: its claim, at a size that this preset can run, with a verdict."""
