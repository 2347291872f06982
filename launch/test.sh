#!/usr/bin/env bash
# The tests: bash launch/test.sh [arguments of pytest; -n 0: one at a time]. Makes its environment as launch/quickstart.sh does.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
d9d_lora_python dev
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # as in launch/quickstart.sh
# Ranks of a test wait for one another, and leave a core idle half of the time: as many processes of tests as there are cores, each with
# a pool of ranks of its own, up to four.
n=$(cores)
n=$((n < 4 ? n : 4))
say "Tests, $n at a time"
"$PYTHON" -m pytest -n "$n" --dist worksteal --durations=12 "$@"
