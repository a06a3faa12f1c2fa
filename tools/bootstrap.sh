#!/bin/sh
# bootstrap.sh VENV REQUIREMENTS: a virtual environment with the pinned requirements and this tree, editable.
# bootstrap.sh: only says which uv to use.
#
# Needs a Python of at least 3.11 and the package index, nothing else: where there is no uv it gets its own
# into .tools/. $PYTHON names the interpreter; without it the first that really runs is taken.
set -eu

say() { printf '%s\n' "$*" >&2; }

# Asked for its version, because a pyenv shim may be on PATH and lead nowhere.
new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        if new_enough "$PYTHON"; then
            command -v "$PYTHON"
            return
        fi
        say "PYTHON=$PYTHON does not run, or is older than Python 3.11, which stanch needs."
        exit 1
    fi
    for candidate in python3.13 python3.12 python3.11 python3.14 python3 python; do
        if new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    say "stanch needs Python 3.11 or newer. Looked for python3.13, python3.12, python3.11, python3.14 and python3."
    if found=$(python3 --version 2>&1); then say "Found only $found."; fi
    say "Install one, or name it: make PYTHON=/path/to/python3.12"
    exit 1
}

find_uv() {
    for candidate in uv .tools/bin/uv; do
        if "$candidate" --version >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    if ! "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        say "$1 cannot make virtual environments: it lacks the modules venv and ensurepip."
        say "Install them (Debian and Ubuntu: the package python3-venv), or put uv on PATH."
        exit 1
    fi
    say "No uv on PATH: installing one into .tools/"
    "$1" -m venv --clear .tools
    .tools/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/tools.txt >&2
    printf '%s\n' .tools/bin/uv
}

# uv knows neither pip.conf nor the certificates that pip was told of. Where that matters, pip does the job.
install() {
    "$uv" pip install --quiet --python "$venv/bin/python" "$@" && return
    say "uv could not install that; trying pip, which reads this machine's pip.conf."
    "$venv/bin/python" -m ensurepip >/dev/null
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

python=$(find_python)
uv=$(find_uv "$python")
if [ $# -eq 0 ]; then
    printf '%s\n' "$uv"
    exit
fi
venv=$1
requirements=$2

if ! new_enough "$venv/bin/python"; then
    say "Making $venv with $("$python" --version), from $requirements"
    UV_PYTHON_DOWNLOADS=never "$uv" venv --quiet --clear --python "$python" "$venv"
fi
install -r "$requirements"
install --no-deps --editable .
