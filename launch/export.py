"""Writes an adapter for another program: see `d9d_lora/export/profiles.py`."""

import sys
from pathlib import Path

from d9d_lora.export.profiles import PROFILES, Job, export
from d9d_lora.keyvalue import Key, UsageError, run

KEYS = {
    "profile": Key("for whom: " + "; ".join(f"{name}: {p.reads}" for name, p in PROFILES.items())),
    "adapter": Key("the adapter's directory, in PEFT's format"),
    "output": Key("what is written; it must not exist"),
    "model.path": Key("the base model's directory; " + ", ".join(n for n, p in PROFILES.items() if p.base) + " need it", ""),
    "rank": Key("put the nearest product of this rank in the place of what is none, or has a higher one", ""),
}


def main(arguments: dict[str, str]) -> None:
    rank = arguments["rank"]
    if rank and not (rank.isascii() and rank.isdigit() and int(rank)):
        raise UsageError(f"rank={rank}: expected a number of at least 1")
    if arguments["profile"] not in PROFILES:
        raise UsageError(f"profile={arguments['profile']}: expected one of {', '.join(PROFILES)}")
    base = arguments["model.path"]
    job = Job(Path(arguments["adapter"]), Path(arguments["output"]), Path(base) if base else None, int(rank) if rank else None)
    print(f"{job.output}: {export(arguments['profile'], job)}")


if __name__ == "__main__":
    sys.exit(run("launch/export.py", "Writes an adapter for another program.", KEYS, main))
