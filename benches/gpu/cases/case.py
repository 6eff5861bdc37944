"""One thing that is checked."""

from typing import Callable, NamedTuple


class Case(NamedTuple):
    name: str
    # Takes the place and returns what was measured; raises AssertionError where something is wrong.
    run: Callable
    # Small enough to be run under a sanitizer, and asks what it is good at finding.
    reduced: bool = False
