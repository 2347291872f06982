# Sourced by the scripts beside it: a Python with this package in it.
#
#   d9d_lora_python EXTRA    sets PYTHON to an interpreter that has torch and `d9d_lora[EXTRA]`
#
# Without D9D_LORA_PYTHON, that is .venv in the clone (D9D_LORA_VENV: elsewhere), made at the first call and brought up to date when
# pyproject.toml or constraints.txt have changed. With it, the interpreter it names is used as it is, and nothing is installed into it.
# pip's own settings (PIP_INDEX_URL and so on) say where packages come from.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n== %s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

d9d_lora_python() {
    local extra=$1
    if [[ -n ${D9D_LORA_PYTHON:-} ]]; then
        PYTHON=$D9D_LORA_PYTHON
        "$PYTHON" -c 'import torch, d9d_lora' || fail "D9D_LORA_PYTHON=$PYTHON has no torch or no d9d_lora. Install them there:
  $PYTHON -m pip install -c launch/constraints.txt torch==2.13.0 && $PYTHON -m pip install -c launch/constraints.txt -e '.[$extra]'
or leave D9D_LORA_PYTHON unset, and .venv is made."
        say "Python: $PYTHON (D9D_LORA_PYTHON, as it is)"
        return
    fi
    local venv=${D9D_LORA_VENV:-$ROOT/.venv}
    local mark="$venv/.installed-$extra" wanted
    PYTHON=$venv/bin/python
    wanted=$(cat "$ROOT/pyproject.toml" "$ROOT/launch/constraints.txt" | cksum)
    if [[ -x $PYTHON && -f $mark && $(cat "$mark") == "$wanted" ]]; then
        say "Python: $venv, up to date"
        return
    fi
    if [[ ! -x $PYTHON ]]; then
        local host
        host=$(_host_python)
        say "Python: making $venv with $("$host" --version 2>&1)"
        "$host" -m venv "$venv"
    fi
    say "Python: installing torch, then d9d_lora[$extra], as pinned in launch/constraints.txt"
    # torch by itself and first: a build of it that is there already (one for your GPU, say) is kept.
    "$PYTHON" -c 'import torch' 2>/dev/null || "$PYTHON" -m pip install --quiet -c "$ROOT/launch/constraints.txt" torch==2.13.0
    (cd "$ROOT" && "$PYTHON" -m pip install --quiet -c launch/constraints.txt -e ".[$extra]")
    echo "$wanted" >"$mark"
}

# The first Python on the PATH that is new enough.
_host_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    fail "no Python of 3.11 or newer with its venv module is on the PATH (on Debian: apt install python3-venv)"
}

cores() { getconf _NPROCESSORS_ONLN 2>/dev/null || sysctl -n hw.ncpu; }
