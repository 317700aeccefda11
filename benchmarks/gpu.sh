#!/usr/bin/env bash
# All figures of one GPU in at most 9 minutes, most important first.
#
#   benchmarks/gpu.sh [--simulate] [--out FOLDER] [PART ...]
#
# FOLDER, or $OUT, gets a CSV a part, written while the part runs, and gpu.log. A part that fails or is stopped at its
# limit does not stop the next. --simulate runs tiny sizes on a simulated device. $PYTHON is the interpreter.
set -u
usage="usage: benchmarks/gpu.sh [--simulate] [--out FOLDER] [PART ...]"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-} simulate=() chosen=() slower=1
while [ $# -gt 0 ]; do
  case $1 in
    --simulate) simulate=(--simulate) slower=10 ;; # a slow machine that others share is no fault
    --out) out=${2:-}; shift ;;
    -*) echo "unknown option $1; $usage" >&2; exit 2 ;;
    *) chosen+=("$1") ;;
  esac
  [ $# -gt 0 ] && shift
done
[ -n "$out" ] || { echo "no folder for the results: give --out FOLDER or set OUT; $usage" >&2; exit 2; }

# part:seconds it may take; together less than ALL. Later parts get what is left.
parts=(tests:130 equality:40 forward:120 metrics:100 training:60 stream:50 autoencoder:60)
ALL=530
for name in ${chosen[@]+"${chosen[@]}"}; do
  [[ " ${parts[*]} " == *" $name:"* ]] || { echo "unknown part $name; parts are ${parts[*]%%:*}" >&2; exit 2; }
done

mkdir -p "$out"
log=$out/gpu.log
: >"$log"
export PYTHONPATH=$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
status=0 summary=()
SECONDS=0
for entry in "${parts[@]}"; do
  part=${entry%%:*} limit=$((${entry##*:} * slower))
  [[ ${#chosen[@]} -eq 0 || " ${chosen[*]} " == *" $part "* ]] || continue
  left=$((ALL * slower - SECONDS)) began=$SECONDS
  [ "$limit" -le "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    line="$part: not run, no time left"
    status=1
  else
    timeout --kill-after=5 "$limit" "${PYTHON:-python3}" "$here/gpu_$part.py" --out "$out" "${simulate[@]+"${simulate[@]}"}" \
      2>&1 | tee -a "$log"
    rc=${PIPESTATUS[0]} rows=0
    [ -f "$out/$part.csv" ] && rows=$(($(wc -l <"$out/$part.csv") - 1))
    case $rc in
      0) outcome="done" ;;
      124 | 137) outcome="stopped after $limit s" ;;
      *) outcome="failed, status $rc" ;;
    esac
    [ "$rc" -eq 0 ] || status=1
    line="$part: $outcome, $rows lines of figures, $((SECONDS - began)) s"
  fi
  echo "== $line" | tee -a "$log"
  summary+=("$line")
done
echo "== all parts in $SECONDS s" | tee -a "$log"
printf '%s\n' "${summary[@]}" | tee -a "$log"
exit $status
