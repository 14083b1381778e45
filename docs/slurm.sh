#!/usr/bin/env bash
# Several machines under Slurm: sbatch docs/slurm.sh [--table.key value ...], from the repository's root,
# on a file system that all machines see. CONFIG_FILE names the TOML.
#SBATCH --job-name=moe_dtensor
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
# Two minutes before its time is up, and when it is pre-empted, the run is asked to save and end; then it is requeued.
#SBATCH --signal=USR1@120
#SBATCH --requeue
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

# Set up once, here: the machines share .venv and would otherwise all make it at the same time.
source scripts/environment.sh
use_environment

head_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export NNODES="$SLURM_NNODES"
export NGPU="${NGPU:-8}"
export RDZV_ENDPOINT="$head_node:${RDZV_PORT:-29500}"

# One task per machine; the launcher starts that machine's ranks, passes the signal on, and ends with 75 once the run is
# saved. A requeued job resumes by the same command.
status=0
srun --kill-on-bad-exit=0 ./run_train.sh "$@" || status=$?
if [ "$status" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
