#!/usr/bin/env bash
# Tests, tunes and measures on a CUDA device, from the root of a checkout: commands with a time limit and a folder each.
# A second start goes on with what is not done. README.md beside this file says more.
#
#   bash benchmarks/gpu_run.sh [--list] [STEP ...]      --cpu: the same way with tiny sizes, without a GPU, in minutes
#
# PYTHON           has torch, triton, pytest, hypothesis and what sdcore needs; sdcore need not be installed (python3)
# GPU_RUN_SECONDS  after which nothing more is started (an hour); GPU_RUN_FOLDER is build/gpu-run, build/gpu-run-cpu
# OUT              a folder for gpu-run.tar.gz, the whole of GPU_RUN_FOLDER, written after every command
set -u
root="$(cd "$(dirname "$0")/.." && pwd)" && cd "$root" || exit 2
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
device=cuda suffix="" quick="" only_list=false wanted=" " python="${PYTHON:-python3}" status=0
for argument in "$@"; do
    case "$argument" in
        --cpu) device=cpu suffix=-cpu quick=--quick; export TRITON_INTERPRET=1 ;;
        --list) only_list=true ;;
        tests | tune | workspace | divergence | prefix | memory | step) wanted+="$argument " ;;
        *) echo "a step is tests, tune, workspace, divergence, prefix, memory or step, got $argument" >&2; exit 2 ;;
    esac
done
folder="${GPU_RUN_FOLDER:-$root/build/gpu-run$suffix}"

# do_once STEP/PART SECONDS COMMAND...: runs the command unless it is done; @ among its arguments stands for its folder.
do_once() {
    local name=$1 limit=$2 out="$folder/$1" began=$SECONDS code; shift 2
    [[ $wanted == " " || $wanted == *" ${name%%/*} "* ]] || return 0
    if [[ -e $out/done ]]; then echo "done        $name, $(<"$out/done")"; return; fi
    if $only_list; then echo "to do       $name, at most $limit s: ${*/#@/$out}"; return; fi
    if ((SECONDS >= ${GPU_RUN_SECONDS:-3600})); then echo "not reached $name"; status=1; return; fi
    mkdir -p "$out"
    timeout --kill-after=5 "$limit" "${@/#@/$out}" >"$out/log.txt" 2>&1; code=$?
    ((code == 0)) && echo "$((SECONDS - began)) s" >"$out/done" && echo "done        $name, $(<"$out/done")"
    if ((code)); then
        tail -n 15 "$out/log.txt"; echo "failed      $name: exit $code (124: too slow), see $out/log.txt"; status=1
    fi
    if [[ ${OUT:-} ]]; then tar -czf "$OUT/.part" -C "$folder" . && mv "$OUT/.part" "$OUT/gpu-run.tar.gz"; fi
}

if ! $only_list; then
    name='import sys, torch; print(torch.cuda.get_device_name() if sys.argv[1] == "cuda" else "CPU")'
    here="$("$python" -c "$name" $device)" || { echo "torch of $python sees no $device" >&2; exit 2; }
    mkdir -p "$folder" ${OUT:+"$OUT"} && [[ -e $folder/device ]] || echo "$here" >"$folder/device"
    [[ $(<"$folder/device") == "$here" ]] || { echo "$folder is another device's: $(<"$folder/device")" >&2; exit 2; }
fi
tests=("$python" -m pytest tests/sdkernels/test_triton_interpret.py -q --maxfail=20 -p no:cacheprovider)
tune=("$python" benchmarks/gpu_tune.py) bench=("$python" -m sdcore bench) to=(--seconds 0.5 --device cuda --output @)
memory=("$python" -m sdcore profile-memory --measure --contenders ours,naive --device $device --output @)
[[ ! $quick ]] || tests+=(-p no:xdist -k "empty_tile or forms_no_gradient or without_mass")
do_once tests/kernels 300 "${tests[@]}"
if [[ ! $quick ]]; then
    do_once tests/sizes 570 "$python" -m pytest tests/sdkernels/test_triton_sizes.py -q --maxfail=20 -p no:cacheprovider
    do_once tests/attention 300 "$python" -m pytest tests/sdcore/prefix/test_attention.py -q -k on_a_gpu -p no:cacheprovider
fi
do_once tune/kernels 300 "${tune[@]}" kernels @ $quick
do_once workspace/goals 300 "${tune[@]}" workspace @ $quick
do_once tune/table 60 "${tune[@]}" table "$folder" $quick
if [[ $quick ]]; then
    for suite in divergence prefix step; do do_once $suite/quick 600 "${bench[@]}" $suite --quick --output @; done
    do_once memory/world 300 "${memory[@]}" --model world --prompt-tokens 256 --context-tokens 128 --completion-tokens 128
else
    $only_list || cp -r "$folder/tables" kernels/sdkernels/ 2>/dev/null # what follows is tuned
    do_once divergence/all 570 "${bench[@]}" "${to[@]}"
    for case in qwen3-0.6b:P=1024 qwen3-0.6b:P=3072 qwen3-4b:L=12,P=1024 qwen3-4b:L=12,P=2048; do
        do_once prefix/$case 80 "${bench[@]}" prefix --model ${case%:*} --shape ${case#*:},C=256,R=128,G=8 "${to[@]}"
    done
    for case in qwen3-0.6b:256,G=8 qwen3-4b:128,G=4; do
        do_once memory/${case%:*}-config 60 "${tune[@]}" ${case%:*} @
        do_once memory/${case%:*} 90 "${memory[@]}" --model "$folder/memory/${case%:*}-config" --scale-layers 0 \
            --scale-width 1 --scale-tokens 1 --context-tokens 256 --completion-tokens 256 --dtype bfloat16
        do_once step/${case%:*} 120 "${bench[@]}" step --model ${case%:*} --shape P=1024,C=256,R=${case#*:} "${to[@]}"
    done
fi
exit $status
