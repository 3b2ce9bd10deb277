#!/usr/bin/env bash
# Makes the environment that `make` uses: .venv in the checkout, the package installed into it as it lies.
#
#   environment.sh STAMP [EXTRA]    installs the package (with an extra), then writes STAMP
#
# torch goes first, in a pip call of its own: its version range lets pip take the CPU build where one lies at hand.
# deepspeed has no wheel; its build needs torch, setuptools and wheel there already, hence no build isolation.
set -euo pipefail

stamp=$1 extra=${2:-}
log=.venv/install.log
export DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '== %s\n' "$*"; }

fail() { # fail WHAT TO_DO
    printf 'environment: %s\n  to do: %s\n' "$1" "$2" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.11 python3.12 python3.13 python3.14; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    fail 'there is no Python 3.11 or newer on PATH' 'install python3 (3.11 or newer), or run: make PYTHON=/path/to/python3'
}

make_venv() {
    local python
    python=$(find_python)
    say "environment: .venv with $("$python" --version)"
    rm -rf .venv
    if ! "$python" -m venv .venv >/dev/null 2>&1; then
        # Debian keeps ensurepip in a package of its own; pip or virtualenv may be there all the same
        rm -rf .venv
        { "$python" -m venv --without-pip .venv && "$python" -m pip --python .venv/bin/python install -q pip; } \
            >/dev/null 2>&1 \
            || { rm -rf .venv; "$python" -m virtualenv -q .venv >/dev/null 2>&1; } \
            || install_venv_package "$python"
    fi
    pwd >.venv/.place
}

install_venv_package() {
    local package
    package=$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "environment: apt-get install $package, which this Python needs to make environments"
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package"; } >/dev/null </dev/null
    fi
    rm -rf .venv
    "$1" -m venv .venv || fail 'this Python cannot make environments (no ensurepip)' "sudo apt-get install $package"
}

install() { # install WHAT PIP_ARGUMENTS...
    local what=$1 started=$SECONDS
    shift
    say "$what"
    if ! .venv/bin/python -m pip install --progress-bar off "$@" </dev/null 2>&1 | tee -a "$log" | show; then
        tail -n 15 "$log" >&2
        fail "pip could not install ($what)" "see $PWD/$log; the first time needs the network or a local package index"
    fi
    [ -t 1 ] && printf '\r\033[K'
    say "   done in $((SECONDS - started)) s"
}

show() { # what pip is at, on one line of a terminal; nothing in a log
    local line
    while IFS= read -r line; do
        case $line in
            Collecting* | Downloading* | Building* | Installing*) [ -t 1 ] && printf '\r\033[K   %.100s' "$line" ;;
        esac
    done
    return 0
}

requirement() { # the line of pyproject.toml that begins so
    .venv/bin/python - "$1" <<'PYTHON'
import sys, tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
print(next(line for line in project["project"]["dependencies"] if line.startswith(sys.argv[1])))
PYTHON
}

mend_programs() { # the kernel cuts the first line of a script at a blank, and pip's own cure leaves some scripts out
    case $PWD in *' '*) ;; *) return 0 ;; esac
    .venv/bin/python - <<'PYTHON'
import sys
from pathlib import Path

for path in Path(sys.executable).parent.iterdir():
    if path.is_symlink() or not path.is_file():
        continue
    first, newline, rest = path.read_bytes().partition(b"\n")
    if first.startswith(b"#!" + sys.prefix.encode()):
        start = f"#!/bin/sh\n'''exec' \"{sys.executable}\" \"$0\" \"$@\"\n' '''\n".encode()
        path.write_bytes(start + rest)
PYTHON
}

if [ -f .venv/.place ] && [ "$(cat .venv/.place)" != "$PWD" ]; then
    say 'environment: the checkout has moved, and programs in .venv name the old place: making it again'
    rm -rf .venv
fi
.venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv

if [ -z "$extra" ]; then
    install 'installing torch (the largest part)' "$(requirement torch)"
    install 'installing what builds deepspeed from source' 'setuptools>=77' wheel ninja packaging psutil py-cpuinfo
    install 'installing deepspeed, transformers and the rest' --no-build-isolation -e .
else
    if [ "$extra" = dev ]; then
        # It has no wheel, and its old kind of setup fetches an egg that does not run; with PEP 517 pip builds it apart.
        install 'installing seqeval, built apart' --use-pep517 'seqeval>=1.2.2'
    fi
    install "installing what $extra needs" --no-build-isolation -e ".[$extra]"
    if [ "$extra" = bench ]; then # pyproject.toml says why
        install 'installing litdata without torchvision' --no-deps 'litdata>=0.2.50'
    fi
fi
mend_programs
rm -f .venv/.installed-*"${extra:+-$extra}"
touch "$stamp"
