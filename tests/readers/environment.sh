#!/usr/bin/env bash
# Installs a reader of what `convert` writes beside the project's environment.
#
#   environment.sh FOLDER STAMP PACKAGE    makes FOLDER/bin/python with PACKAGE, then writes STAMP
#
# FOLDER is an environment of its own that sees the packages of .venv behind its own: torch and the rest are shared, and
# only what PACKAGE wants in other versions is installed. .venv itself is not touched. transformers 4.57 is the last
# series before 5, which most of the ecosystem still pins; pip's complaint that palimpsest wants a newer one is right,
# and meant: nothing of palimpsest runs there. torchao writes warnings whenever transformers is imported beside it.
set -euo pipefail

folder=$1 stamp=$2 package=$3
python=.venv/bin/python
log=$folder.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

printf '== environment: %s with %s\n' "$folder" "$package"
rm -rf "$folder" "${stamp%-*}"-*
mkdir -p "$(dirname "$folder")"
"$python" -m venv --without-pip "$folder"
"$python" -c 'import site; print(site.getsitepackages()[0])' \
    >"$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')/shared.pth"
if ! "$python" -m pip --python "$folder/bin/python" install --progress-bar off "$package" \
    >"$log" 2>&1 </dev/null; then
    tail -n 15 "$log" >&2
    printf 'readers: pip could not install %s\n' "$package" >&2
    printf '  to do: see %s; the first time needs the network or a local package index\n' "$log" >&2
    exit 1
fi
touch "$stamp"
