# Sourced by run_train.sh and tests/run.sh. `use_environment [extra]`, called in the repository's root, makes `python`
# one that has this package (and the extra): the active environment if it holds the package, else .venv, made on need.

# Tells what is done; an output that is closed or full ends nothing.
tell() {
    { echo "$@"; } 2>/dev/null || true
}

use_environment() {
    local extra="${1:-}" python stamp
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && (cd / && python -c 'import moe_dtensor') 2>/dev/null; then
        return
    fi
    # The root is part of the stamp: a folder that was moved or copied needs its editable install anew.
    stamp="$( (cat pyproject.toml constraints.txt && pwd) | cksum)"
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python="$(find_python)" || return 1
        tell "Making .venv with $("$python" --version) ($python)"
        rm -rf .venv
        "$python" -m venv .venv
    fi
    if [ "$(cat ".venv/installed-${extra:-base}" 2>/dev/null)" != "$stamp" ]; then
        tell "Installing moe_dtensor${extra:+[$extra]} and the versions of constraints.txt into .venv"
        # Byte code is written on first import: compiling all of torch's here would double the time.
        .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check \
            -c constraints.txt -e ".${extra:+[$extra]}"
        echo "$stamp" >".venv/installed-${extra:-base}"
        echo "$stamp" >.venv/installed-base
    fi
    export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
}

# Prints the first Python >= 3.11 that can make a virtual environment. PYTHON names another to try first.
find_python() {
    local python
    for python in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$python"
            return
        fi
    done
    echo "error: no Python 3.11 or newer with the venv module was found." >&2
    echo "       Install one (Debian: apt install python3 python3-venv), or name it: PYTHON=/path/to/python $0" >&2
    return 1
}
