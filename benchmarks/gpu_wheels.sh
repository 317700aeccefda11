#!/usr/bin/env bash
# Collects the wheels that a machine with torch and CUDA lacks for gpu.sh, where it has no package index.
#
#   benchmarks/gpu_wheels.sh [--list] [FOLDER]
#
# FOLDER is .whl by default. The machine has Python 3.12 on x86-64 with torch 2.8 or later, timm, huggingface_hub,
# pyarrow, pandas, scikit-learn, matplotlib, safetensors, rich, jaxtyping, hypothesis and pytest. --list names the
# wheels and fetches none. Tree and wheels may take 60 MiB together. $PYTHON is the interpreter whose pip downloads.
set -eu
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tree=$(dirname "$here")

# `datasets` with what it needs, the command line with what it needs, re-basin's statistics, checks of the tests, a peer
wheels=(
  datasets dill==0.4.1 multiprocess==0.70.19
  cyclopts docstring-parser rich-rst
  mlxtend
  numkong
  beartype
  pytorch-cka==1.1.3
)
MOST_MIB=60

if [ "${1:-}" = --list ]; then
  printf '%s\n' "${wheels[@]}"
  exit
fi
folder=${1:-$tree/.whl}
mkdir -p "$folder"
rm -f "$folder"/*.whl # two versions of one package stop an installation
platforms=()
for version in 2_28 2_27 2_17; do platforms+=(--platform "manylinux_${version}_x86_64"); done
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --platform manylinux2014_x86_64 --constraint "$tree/constraints.txt" -d "$folder" "${wheels[@]}"

kib=$(du -k --total --apparent-size "$folder"/*.whl | tail -1 | cut -f1)
[ ! -e "$tree/.git" ] || tracked=$(cd "$tree" && git ls-files -z | du -k --total --apparent-size --files0-from=- | tail -1 | cut -f1)
echo "wheels $((kib / 1024)) MiB, tree $((${tracked:-0} / 1024)) MiB in $(basename "$folder")"
if [ $((kib + ${tracked:-0})) -gt $((MOST_MIB * 1024)) ]; then
  echo "tree and wheels take more than $MOST_MIB MiB together: drop wheels from the list" >&2
  exit 1
fi
