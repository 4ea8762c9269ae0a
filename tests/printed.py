"""Printed text as words and numbers, for tests that compare what a page shows with a new run."""

import re

NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w.]*\w)")


def words_of(text):
    """The text with "#" for each number; spaces and the ends of lines do not count."""
    return " ".join(NUMBER.sub(" # ", text).split())


def unit_of(number):
    """What the last digit stands for: 0.01 of 3.14, 1e-6 of 2.1e-5; of a whole number nothing."""
    digits, _, exponent = number.partition("e")
    decimals = len(digits.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals or exponent else 0.0
