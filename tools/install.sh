#!/bin/sh
# Makes a virtual environment with the project and everything its tests need, at the pinned versions.
#   tools/install.sh VENV [PYTHON]
# Without PYTHON the first interpreter >= 3.11 that can make a virtual environment is taken. A VENV that was completed
# for the present pyproject.toml and constraints.txt is left as it is.
set -eu

venv=$1
asked=${2:-}
stamp=$venv/.installed

usable() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

say() {
    echo "install: $*" >&2
}

find_python() {
    older= lacking=
    if [ -n "$asked" ]; then
        set -- "$asked"
    else
        set -- python3 python3.11 python3.12 python3.13 python3.14 python \
            "$HOME"/.pyenv/versions/3.11*/bin/python3 "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python3
    fi
    for candidate in "$@"; do
        "$candidate" -c '' >/dev/null 2>&1 || continue
        if ! usable "$candidate"; then
            older="$older $candidate ($("$candidate" -V 2>&1))"
        elif ! "$candidate" -c 'import venv, ensurepip' >/dev/null 2>&1; then
            lacking="$lacking $candidate"
        else
            echo "$candidate"
            return
        fi
    done
    if [ -n "$lacking" ]; then
        say "these interpreters cannot make virtual environments, their venv or ensurepip module is missing:$lacking"
        say "install it (Debian and Ubuntu: the package python3-venv), then try again"
    elif [ -n "$older" ]; then
        say "Python 3.11 or newer is needed; found only:$older"
        say "install a newer Python and put it on PATH as python3, python3.11 or python3.12, then try again"
    else
        say "Python 3.11 or newer is needed, and none was found on PATH${asked:+ (asked for: $asked)}"
    fi
    return 1
}

wanted=$(cat pyproject.toml constraints.txt tools/install.sh | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && usable "$venv/bin/python"; then
    exit 0
fi
rm -f "$stamp"

if ! usable "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "making $venv with $("$python" -V)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
say "installing the project and its pinned dependencies into $venv (the first time takes some minutes)"
"$venv/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,notebooks]'
echo "$wanted" >"$stamp"
say "done"
