#!/bin/bash
# Trains under Open MPI:
#
#     launch/mpi.sh -n 16 --host node1:8,node2:8 -- --config=configs/gpt3.py:1.3b --workdir=/shared/runs/1.3b
#
# Before the -- stand mpirun's own flags, after it those of `python -m gpt_jax.main`. One process a GPU, as under Slurm.
# The workdir is a folder that all hosts share, or gs://BUCKET/RUN.
#
# Open MPI 4: jax takes the host of mpirun for that of process 0, so call this on the first host that --host names.
# Open MPI 5, or mpirun called elsewhere: COORDINATOR=node1:1234 launch/mpi.sh ... names host and port of process 0.
set -uo pipefail

own=()
while (($#)) && [[ $1 != -- ]]; do own+=("$1"); shift; done
if ((!$#)); then echo "usage: launch/mpi.sh MPIRUN_FLAGS -- TRAINING_FLAGS" >&2; exit 2; fi
shift

# Each process runs this: the ranks are known only there.
# shellcheck disable=SC2016
process='
if [[ -n ${COORDINATOR:-} ]]; then
  set -- --coordinator="$COORDINATOR" --num_processes="$OMPI_COMM_WORLD_SIZE" --process_id="$OMPI_COMM_WORLD_RANK" "$@"
else
  set -- --distributed "$@"
fi
exec python -m gpt_jax.main "$@"
'

restarts=20
for ((attempt = 0; attempt <= restarts; attempt++)); do
  # mpirun passes SIGTERM on and would kill one second later: the run has five minutes to save.
  OMPI_MCA_odls_base_sigkill_timeout=300 \
    mpirun "${own[@]}" ${COORDINATOR:+-x COORDINATOR} bash -c "$process" gpt_jax "$@"
  status=$?
  echo "$(date -Is) attempt $attempt ended with status $status"
  # What fails within a minute fails again: a mistake in the command, most often.
  if ((status == 0 || SECONDS < 60)); then exit "$status"; fi
  case $status in 129 | 130 | 143) exit "$status" ;; esac # stopped and saved
  SECONDS=0
done
exit "$status"
