#!/bin/bash
# Trains on several nodes of a Slurm cluster:
#
#     sbatch launch/slurm.sh --config=configs/gpt3.py:1.3b --workdir=/shared/runs/1.3b
#
# What follows the script's name are the flags of `python -m gpt_jax.main`. The workdir is a folder that all nodes
# share, or gs://BUCKET/RUN. Set nodes and GPUs to yours; for CPUs, leave the line with the GPUs out.
#
# One task a GPU: jax reads in SLURM_LOCALID which GPU of its node is a task's own. So all GPUs of a node are visible to
# each of its tasks: no --gpus-per-task and no --gpu-bind, which would hide the others and number each task's own 0.
#SBATCH --job-name=gpt_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Five minutes before the time is up each task gets SIGTERM: the run saves and exits with 143.
#SBATCH --signal=TERM@300
# A job whose node fails is put into the queue again, and so is one whose time is up (below). Its output goes on.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

restarts=20
for ((attempt = 0; attempt <= restarts; attempt++)); do
  # When one task ends with an error the others end as well, and all start again from the last checkpoint.
  srun --kill-on-bad-exit=1 --wait=60 python -m gpt_jax.main --distributed --connect_seconds=300 "$@"
  status=$?
  echo "$(date -Is) attempt $attempt ended with status $status"
  # What fails within a minute fails again: a mistake in the command, most often.
  if ((status == 0 || SECONDS < 60)); then exit "$status"; fi
  case $status in
    130) exit 130 ;;                                   # scancel --signal=INT: stopped and saved
    143) scontrol requeue "$SLURM_JOB_ID"; exit 143 ;; # saved, for want of time
  esac
  SECONDS=0
done
exit "$status"
