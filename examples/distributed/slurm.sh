#!/bin/bash
# Training on two machines with four GPUs each. If the job is submitted again, or requeued by Slurm after a failure, it resumes the run.
# Written from the documentation of Slurm and torchrun. slm's tests have no cluster and do not run it.
#
#   sbatch examples/distributed/slurm.sh recipe.yaml /shared/runs/stories

#SBATCH --job-name=slm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1        # one torchrun a machine, which starts one process a GPU
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue                  # after a machine failed, or the job was preempted
#SBATCH --signal=TERM@180          # three minutes before the time limit: the run saves and stops
#SBATCH --open-mode=append

set -euo pipefail
recipe=$1
run=$2                             # on storage that all machines see: every process reads data and state from it

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# The first job creates the run; later ones resume it.
if [ -f "$run/config.yaml" ]; then
  arguments=(--resume --out "$run")
else
  arguments=(--recipe "$recipe" --out "$run")
fi

# Prepare large data beforehand, so that eight GPUs do not wait: slm data prepare --out /shared/data ..., and data.train: /shared/data.
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" \
  --nproc-per-node 4 \
  --rdzv-backend c10d \
  --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-endpoint "$first:29500" \
  -m slm train "${arguments[@]}"
