"""Regular expressions out of files, matched in time that grows with pattern x name, and not with 2^name.

    text -> tree -> a graph of states (Thompson 1968) -> all states a name can be in, character by character

Python's engine tries one way after another, so `(a+)+b` in somebody's `rank_pattern` keeps it busy for years. Here all ways are walked at
once. Alternatives, groups, sets, repeats and anchors are known, which is what patterns for names are made of; an expression that looks
around or back cannot be matched like this and is refused.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

MAX_PATTERN, MAX_STATES = 2000, 1000  # characters; states, where a{9} is nine
MAX_PATTERNS, MAX_PAIRS, MAX_STEPS = 10_000, 4_000_000, 30_000_000  # of one file: seconds at worst
MAX_WAYS = 1_000_000  # that Python's engine may have to try
_SIMPLE = re.compile(r"\^?(?:[^\\()\[\]{}*+?|^$]|\\[^\w\s])*")  # text, dots and escaped signs: no choice, so nothing is tried twice
_REPEAT = re.compile(r"\{(?:(\d+)|(\d*),(\d*))\}")
Test = Callable[[str], bool]  # of one character
Guard = Callable[[str, int], bool]  # of a place in a name
_CLASSES: dict[str, Test] = {"d": str.isdecimal, "w": lambda c: c.isalnum() or c == "_", "s": str.isspace}
_ANCHORS: dict[str, Guard] = {
    "^": lambda name, at: at == 0,
    "$": lambda name, at: at == len(name) or name[at:] == "\n",
}


class NotLinear(ValueError):
    """An expression that is broken, that this engine does not know, or that is too large for it."""


def check_key(key: str) -> None:
    """Raises `NotLinear` unless `ends_like` takes the key; compiles nothing that it need not."""
    if len(key) > MAX_PATTERN or not _SIMPLE.fullmatch(key):
        Linear(rf"(.*\.)?({key})$")


@lru_cache(maxsize=2 * MAX_PATTERNS)
def ends_like(key: str) -> Callable[[str], object]:
    """PEFT's test of a name by a key of `rank_pattern`: `re.match(rf"(.*\\.)?({key})$", name)`.

    Raises:
        NotLinear: see `Linear`.
    """
    if len(key) <= MAX_PATTERN and _SIMPLE.fullmatch(key):
        return re.compile(rf"(.*\.)?({key})$").match
    return Linear(rf"(.*\.)?({key})$").match


@lru_cache(maxsize=4096)
def is_like(pattern: str) -> Callable[[str], object]:
    """A test whether a pattern matches all of a name of the reader's own model.

    Python's engine, which is faster, where it cannot have many ways to try.

    Raises:
        NotLinear: see `Linear`.
    """
    tree = _Parser(pattern).parse()
    return re.compile(pattern).fullmatch if _ways(tree) <= MAX_WAYS else Linear(pattern).fullmatch


def refuse_costly(keys: Iterable[str], names: Iterable[str]) -> None:
    """Raises `NotLinear` if testing every name by every key would take longer than a few seconds."""
    keys, names = list(keys), list(names)
    states = sum(len(Linear(key).tests) for key in keys if not _SIMPLE.fullmatch(key))
    if len(keys) > MAX_PATTERNS or len(keys) * len(names) > MAX_PAIRS or states * sum(map(len, names)) > MAX_STEPS:
        raise NotLinear(f"{len(keys)} patterns for {len(names)} layers take too long to match; write fewer, or shorter repeats")


class Linear:
    """A compiled expression in Python's syntax, without lookaround, references, flags and possessive repeats.

    Raises:
        NotLinear: where the pattern breaks, and why.
    """

    def __init__(self, pattern: str) -> None:
        self.tests: list[Test | None] = []  # what a state takes; None: nothing, it only leads on
        self._guards: list[Guard | None] = []  # where in the name it may be passed
        self._next: list[list[int]] = []
        try:
            self._first = self._state()
            self._last = self._build(_Parser(pattern).parse(), self._first)
        except RecursionError:
            raise NotLinear("groups in each other too deep") from None

    def match(self, name: str) -> bool:
        """Whether some beginning of the name matches."""
        return self._walk(name, whole=False)

    def fullmatch(self, name: str) -> bool:
        """Whether all of the name matches."""
        return self._walk(name, whole=True)

    def _walk(self, name: str, *, whole: bool) -> bool:
        now = self._reach([self._first], name, 0)
        for at, character in enumerate(name, 1):
            if not now or (not whole and self._last in now):
                break
            taken = [state for state in now if (test := self.tests[state]) is not None and test(character)]
            now = self._reach([after for state in taken for after in self._next[state]], name, at)
        return self._last in now

    def _reach(self, states: list[int], name: str, at: int) -> set[int]:
        """These states and those they lead on to without a character."""
        found: set[int] = set()
        while states:
            state = states.pop()
            guard = self._guards[state]
            if state not in found and (guard is None or guard(name, at)):
                found.add(state)
                if self.tests[state] is None:
                    states += self._next[state]
        return found

    def _state(self, test: Test | None = None, guard: Guard | None = None, after: int | None = None) -> int:
        if len(self._next) >= MAX_STATES:
            raise NotLinear(f"more than {MAX_STATES} states: write its repeats shorter")
        self.tests.append(test)
        self._guards.append(guard)
        self._next.append([])
        if after is not None:
            self._next[after].append(len(self._next) - 1)
        return len(self._next) - 1

    def _build(self, node: "_Node", at: int) -> int:
        """Adds the states of a node behind the state `at`; returns the state where it ends, which takes nothing."""
        if isinstance(node, _Take):
            return self._state(after=self._state(node.test, after=at))
        if isinstance(node, _Anchor):
            return self._state(guard=node.guard, after=at)
        if isinstance(node, _Sequence):
            for part in node.parts:
                at = self._build(part, at)
            return at
        if isinstance(node, _Choice):
            ends = [self._build(way, at) for way in node.ways]
        else:
            ends = [at] if node.least == 0 else []
            for number in range(max(node.least, node.most or 0)):
                at = self._build(node.part, at)
                ends += [at] if number + 1 >= node.least else []
            if node.most is None:
                loop = self._state(after=at)
                self._next[self._build(node.part, loop)].append(loop)
                ends.append(loop)
        end = self._state()
        for way in ends:
            self._next[way].append(end)
        return end


@dataclass
class _Take:
    test: Test


@dataclass
class _Anchor:
    guard: Guard


@dataclass
class _Sequence:
    parts: "list[_Node]"


@dataclass
class _Choice:
    ways: "list[_Node]"


@dataclass
class _Repeat:
    part: "_Node"
    least: int
    most: int | None


_Node = _Take | _Anchor | _Sequence | _Choice | _Repeat


def _ways(node: _Node) -> float:
    """About how many ways there are to match a name of a module, if every repeat of a character has a choice of a hundred lengths."""
    if isinstance(node, _Sequence):
        return math.prod(map(_ways, node.parts))
    if isinstance(node, _Choice):
        return sum(map(_ways, node.ways))
    if not isinstance(node, _Repeat):
        return 1
    if node.most == 1:
        return 1 + _ways(node.part)
    return 100 if isinstance(node.part, _Take) else math.inf


class _Parser:
    """Text -> tree."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_PATTERN + 20:
            raise NotLinear(f"{len(text)} characters; at most {MAX_PATTERN} are read")
        self.text, self.at = text, 0

    def parse(self) -> _Node:
        tree = self._choice()
        if self.at < len(self.text):
            raise self._broken("a bracket closes that none has opened")
        return tree

    def _broken(self, why: str) -> NotLinear:
        return NotLinear(f"{why}, before character {self.at + 1} of {self.text!r}")

    @property
    def _here(self) -> str:
        return self.text[self.at : self.at + 1]

    def _take(self) -> str:
        if not self._here:
            raise self._broken("it ends too early")
        self.at += 1
        return self.text[self.at - 1]

    def _choice(self) -> _Node:
        ways = [self._sequence()]
        while self._here == "|":
            self.at += 1
            ways.append(self._sequence())
        return _Choice(ways) if len(ways) > 1 else ways[0]

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._here not in ("", "|", ")"):
            part = self._atom()
            if (times := self._times()) is not None:
                if isinstance(part, _Anchor):
                    raise self._broken("an anchor is repeated")
                part = _Repeat(part, *times)
                if self._here == "?":
                    self.at += 1  # the shortest first: the order of the ways does not matter to whether there is one
                if self._times() is not None:
                    raise self._broken("a repeat is repeated")
            parts.append(part)
        return _Sequence(parts)

    def _times(self) -> tuple[int, int | None] | None:
        signs: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self._here in signs:
            return signs[self._take()]
        found = _REPEAT.match(self.text, self.at)
        if not found:
            return None  # a brace that is no repeat stands for itself
        self.at = found.end()
        counts = [int(text[:9]) if text else None for text in found.groups()]
        least, most = (counts[0], counts[0]) if found[1] else (counts[1] or 0, counts[2])
        assert least is not None
        if most is not None and most < least:
            raise self._broken("a repeat ends before it begins")
        return least, most

    def _atom(self) -> _Node:
        begin = self.at
        if self._times() is not None:
            raise self._broken("a repeat of nothing")
        self.at = begin
        sign = self._take()
        if sign == "(":
            if self._here == "?" and self.text[self.at : self.at + 2] != "?:":
                raise self._broken("a group that looks around, sets flags or has a name")
            self.at += 2 * (self._here == "?")
            inner = self._choice()
            if self._here != ")":
                raise self._broken("a bracket is not closed")
            self.at += 1
            return inner
        if sign in _ANCHORS:
            return _Anchor(_ANCHORS[sign])
        if sign == "[":
            return _Take(self._set())
        if sign == "\\":
            return _Take(self._escaped())
        return _Take((lambda c: c != "\n") if sign == "." else (lambda c: c == sign))

    def _escaped(self) -> Test:
        sign = self._take()
        if sign.lower() in _CLASSES:
            test = _CLASSES[sign.lower()]
            return test if sign.islower() else lambda c: not test(c)
        if sign.isalnum():
            raise self._broken(f"\\{sign} is not known here")
        return lambda c: c == sign

    def _set(self) -> Test:
        negative = self._here == "^"
        self.at += negative
        tests: list[Test] = []
        while not tests or self._here != "]":
            low, test = self._member()
            if self._here == "-" and self.text[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                high, _ = self._member()
                if not low or not high or high < low:
                    raise self._broken("a range of characters ends before it begins")
                test = lambda c, low=low, high=high: low <= c <= high  # type: ignore[misc]  # noqa: E731
            tests.append(test)
        self.at += 1
        return lambda c: any(test(c) for test in tests) != negative

    def _member(self) -> tuple[str, Test]:
        """(the character, or nothing for a class of them; its test)."""
        sign = self._take()
        if sign != "\\":
            return sign, lambda c: c == sign
        known = self._here
        return "" if known.lower() in _CLASSES else known, self._escaped()
