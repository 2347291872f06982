"""What a run will need: see `d9d_lora/plan/main.py`, or `python launch/plan.py --help`."""

import sys

from d9d_lora.plan.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
