"""Arguments of small commands, `key=value` as in the training configs: known keys only, each error with its mend."""

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


class UsageError(ValueError):
    """A command line that cannot be understood; the message says what was expected."""


@dataclass(frozen=True)
class Key:
    """One argument: what it is for, and its default (None: it must be given)."""

    help: str
    default: str | None = None


def parse(arguments: Sequence[str], keys: Mapping[str, Key]) -> dict[str, str]:
    """`["a=1", ...]` -> `{"a": "1", ...}` with defaults filled in.

    Raises:
        UsageError: an unknown key (with the nearest known one), one given twice, one missing, or no `=`.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in keys:
            near = difflib.get_close_matches(key.lstrip("-"), keys, n=1)
            hint = f"; did you mean {near[0]}=...?" if near else "."
            raise UsageError(f"unknown argument {argument!r}{hint} Known keys: {', '.join(keys)}")
        if not equals:
            raise UsageError(f"{argument!r} has no value; expected {key}=...")
        if key in given:
            raise UsageError(f"{key} is given twice: {given[key]!r} and {value!r}")
        given[key] = value
    if missing := [key for key, k in keys.items() if k.default is None and not given.get(key)]:
        raise UsageError(f"missing: {', '.join(f'{key}=... ({keys[key].help})' for key in missing)}")
    return {key: given.get(key, k.default or "") for key, k in keys.items()}


def usage(script: str, about: str, keys: Mapping[str, Key]) -> str:
    words = [f"{key}=..." if k.default is None else f"[{key}={k.default or '...'}]" for key, k in keys.items()]
    width = max(map(len, keys))
    lines = [f"  {key:<{width}}  {k.help}" for key, k in keys.items()]
    return "\n".join([f"usage: python {script} {' '.join(words)}", "", about, "", *lines])


def run(script: str, about: str, keys: Mapping[str, Key], act: Callable[[dict[str, str]], None]) -> int:
    """The whole of a command: prints its usage, or acts; 0, or 1 with the error in one paragraph on stderr."""
    arguments = sys.argv[1:]
    needed = any(k.default is None for k in keys.values())
    if (needed and not arguments) or {"--help", "-h", "help"} & set(arguments):
        print(usage(script, about, keys))
        return 0 if arguments else 2
    try:
        act(parse(arguments, keys))
    except UsageError as error:
        print(f"error: {error}\nTry: python {script} --help", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
