#!/usr/bin/env bash
# The tests: bash launch/test.sh [arguments of pytest]. Makes its environment as launch/quickstart.sh does.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/env.sh
d9d_lora_python dev
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # as in launch/quickstart.sh
say "Tests"
"$PYTHON" -m pytest "$@"
