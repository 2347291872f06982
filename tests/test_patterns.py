"""Regular expressions out of files: Python's answers, and never Python's time."""

import random
import re
import time

import pytest

from d9d_lora.patterns import Linear, NotLinear, ends_like, refuse_costly
from d9d_lora.targets import by_name


def test_answers_as_python_does():
    """Random expressions over a small alphabet, on random names: the same yes or no, and the same refusals of broken ones."""
    draw = random.Random(0)
    signs = ["a", "b", ".", "1", r"\.", "(", ")", "(?:", "|", "*", "+", "?", "*?", "{2}", "{1,2}", "{,2}", "{2,}", "{", "^", "$"]
    signs += [r"\d", r"\W", "[ab]", "[^a]", "[a-b1]", "[]a]", "[", "-", r"[\d.]"]
    names = ["", *("".join(draw.choices("ab.1", k=draw.randint(1, 6))) for _ in range(30))]
    matched = refused = 0
    for _ in range(3000):
        pattern = "".join(draw.choices(signs, k=draw.randint(1, 7)))
        try:
            theirs = re.compile(pattern)
        except re.error:
            theirs = None
        try:
            ours = Linear(pattern)
        except NotLinear:
            ours = None
        if theirs is None or ours is None:
            assert (theirs is None) == (ours is None) or re.search(r"[*+?}]\+|[(^$]", pattern), pattern  # possessive; anchors repeated
            refused += 1
            continue
        for name in names:
            if re.search(r"\|\)|\(\||\(\)|\|\||\?\)|\*\)|\(\?:\||\(\?:\)|,2?}\)", pattern):
                continue  # a repeat of what may be empty, where Python's engine gives up a way that exists
            assert ours.match(name) == bool(theirs.match(name)), (pattern, name)
            assert ours.fullmatch(name) == bool(theirs.fullmatch(name)), (pattern, name)
            matched += 1
    assert matched > 20_000
    assert refused > 100


@pytest.mark.parametrize("key", ["(a+)+b", "(a|a)*b", "(a|aa)+$x", ".*.*.*.*.*.*.*.*x", "(.*a){12}b", "(?:a?){90}a{90}b"])
def test_no_pattern_explodes(key):
    name, started = f"model.{'a' * 400}", time.monotonic()
    assert by_name({key: 1}, name, 0) == 0
    assert time.monotonic() - started < 2


def test_refuses_what_it_does_not_know():
    deep = ["(" * 5000, "(" * 900 + ")" * 900, "a" * 3000, "a{5000}", "((a{99}){99}){99}"]
    for key in [r"(a)\1", "(?=a)", "(?i)a", "(?P<x>a)", "a*+", r"\ba", *deep]:
        with pytest.raises(NotLinear):
            ends_like(key)
    with pytest.raises(NotLinear, match="take too long"):
        refuse_costly([f"(a?){{{n}}}" for n in range(50, 150)], ["a" * 400] * 100)
    with pytest.raises(NotLinear, match="take too long"):
        refuse_costly([f"x{n}" for n in range(5000)], ["a"] * 1000)
    refuse_costly([f"model.layers.{n}.q_proj" for n in range(600)], [f"model.layers.{n}.q_proj" for n in range(600)])
