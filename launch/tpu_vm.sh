#!/bin/bash
# Trains on all hosts of a TPU slice:
#
#     export TPU=my-v5p ZONE=us-east5-a REPOSITORY=https://github.com/YOU/gpt_jax.git
#     gcloud compute tpus queued-resources create "$TPU" --node-id="$TPU" --zone="$ZONE" \
#       --accelerator-type=v5p-32 --runtime-version=v2-alpha-tpuv5
#     launch/tpu_vm.sh --config=configs/gpt3.py:1.3b --workdir=gs://BUCKET/RUN
#
# What follows the script's name are the flags of `python -m gpt_jax.main`. Each host of the slice runs them, in a clone
# of the repository; jax asks the slice's metadata for the other hosts.
# TPU hosts share no folder: the workdir, and data.cache_dir where the data is large, are in a bucket of their region.
set -uo pipefail
: "${TPU:?names the TPU slice}" "${ZONE:?is its zone}"
: "${REPOSITORY:?is what each host clones}" "${BRANCH:=main}"

setup="test -d gpt_jax || git clone --branch=$BRANCH $REPOSITORY gpt_jax
cd gpt_jax && python3 -m venv --system-site-packages .venv && .venv/bin/pip install -q --editable '.[tpu,gcs]'"
everywhere() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"; }

everywhere "$setup" || exit

# The loop runs on the hosts, so that it outlives this terminal; its output is in gpt_jax/run.log of each. A host that
# is lost ends the others, and all start again from the last checkpoint: they wait up to ten minutes for each other.
# shellcheck disable=SC2016
loop='
for ((attempt = 0; attempt <= 100; attempt++)); do
  .venv/bin/python -m gpt_jax.main --distributed --connect_seconds=600 "$@"
  status=$?
  echo "$(date -Is) attempt $attempt ended with status $status"
  if ((status == 0 || SECONDS < 60)); then exit "$status"; fi
  case $status in 129 | 130 | 143) exit "$status" ;; esac # stopped and saved
  SECONDS=0
done
'
printf -v run 'cd gpt_jax || exit; nohup setsid bash -c %q gpt_jax %s >>run.log 2>&1 </dev/null & echo $! >run.pid' \
  "$loop" "${*@Q}"
everywhere "$run" || exit
ssh="gcloud compute tpus tpu-vm ssh $TPU --zone=$ZONE"
echo "started; to follow it:           $ssh --worker=0 --command='tail -F gpt_jax/run.log'"
echo "to save and stop it everywhere:  $ssh --worker=all --command='kill -TERM -- -\$(cat gpt_jax/run.pid)'"
