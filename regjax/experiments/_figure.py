"""Figures of records."""
def draw(path, records):
    pass
