#!/usr/bin/env bash
# Train: ./run_train.sh [--table.key value ...]
#
#   CONFIG_FILE    the TOML (default train_configs/debug.toml)
#   NGPU           ranks on this machine (default: its GPUs, else 4 CPU ranks)
#   NNODES         machines, each started with this script (default 1)
#   RDZV_ENDPOINT  host:port of one of them, needed for NNODES > 1
#   MAX_RESTARTS   how often ranks that failed are started again by themselves (default 0)
#   RDZV_TIMEOUT   seconds to wait for the others (default 600)
#   PYTHON         the Python to make .venv with (default: the first >= 3.11)
#
# Exit status: 0 done, 1 failed, 2 wrong config or data, 75 ended by a signal and saved (the same command goes on).
set -euo pipefail
# Until the launcher is there, which passes signals on, nothing can be lost.
trap 'exit 75' TERM HUP USR1 INT

started_in="$PWD"
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/environment.sh

config="${CONFIG_FILE:-train_configs/debug.toml}"
# A relative path means the folder the script was called from, if the file is there.
if [ "$started_in" != "$PWD" ] && [ -f "$started_in/$config" ]; then
    config="$started_in/$config"
fi

count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true
    else
        (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true
    fi
}

gpus="$(count_gpus)"
ranks="${NGPU:-$((gpus > 0 ? gpus : 4))}"
nodes="${NNODES:-1}"
for name in NGPU NNODES MAX_RESTARTS; do
    case $name in NGPU) value="$ranks" least=1 ;; NNODES) value="$nodes" least=1 ;; *) value="${MAX_RESTARTS:-0}" least=0 ;; esac
    if ! [[ "$value" =~ ^(0|[1-9][0-9]{0,5})$ ]] || [ "$value" -lt "$least" ]; then
        echo "error: $name=$value must be a whole number, $least or more." >&2
        echo "       Set it to one, or unset it." >&2
        exit 2
    fi
done

use_environment
for word in "$@"; do
    if [ "$word" = --help ] || [ "$word" = -h ]; then
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' run_train.sh
        exec python -m moe_dtensor train --help
    fi
done

# A wrong config is told here, once and in plain words, before any rank starts.
python -m moe_dtensor check --config "$config" --world "$((ranks * nodes))" "$@"

# Ranks share the cores; without this each would start as many threads as there are cores.
cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}"

if [ "$nodes" -gt 1 ]; then
    if [ -z "${RDZV_ENDPOINT:-}" ]; then
        echo "error: NNODES > 1 needs RDZV_ENDPOINT=host:port, the same on every machine." >&2
        exit 2
    fi
    meeting="$(python scripts/meet.py "$RDZV_ENDPOINT" "$nodes" --config "$config" --ranks "$ranks" \
        --timeout "${RDZV_TIMEOUT:-600}" -- "$@")"
    read -r host_number address port interface <<<"$meeting"
    rendezvous=(--nnodes "$nodes" --node-rank "$host_number" --master-addr "$address" --master-port "$port")
    if [ -n "$interface" ]; then
        export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"
    fi
else
    rendezvous=(--standalone)
fi
exec python -m moe_dtensor launch "${rendezvous[@]}" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-0}" \
    train --config "$config" "$@"
