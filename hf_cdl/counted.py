"""A number with what it counts, for people: 1 image, 2,000 images."""

from __future__ import annotations


def counted(number: int, thing: str) -> str:
    """`2,000 training images` of 2000 and `training image`; `1 training image` of 1."""
    return f"{number:,} {thing if number == 1 else plural(thing)}"


def plural(thing: str) -> str:
    """The plural of an English noun, or of a phrase that ends in one, by the rules that its nouns here follow."""
    if thing.endswith("y") and thing[-2:-1] not in "aeiou":
        return f"{thing[:-1]}ies"
    return f"{thing}es" if thing.endswith(("s", "x", "tch", "nch", "sh")) else f"{thing}s"
