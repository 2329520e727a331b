#!/usr/bin/env bash
# The demo on several processes of one machine, by torchrun. Ledger and verdicts are the same on every rank.
#
#   recipes/distributed/torchrun.sh                                  # the demo on two processes, on CPUs or GPUs
#   PROCESSES=8 recipes/distributed/torchrun.sh --config mitigate/hold      # further options go to `memsink fit`
#   recipes/distributed/torchrun.sh --ckpt_path=last.ckpt            # resumes, with any number of processes
set -euo pipefail

PROCESSES=${PROCESSES:-2}

# Each process gets an equal part of the samples, so a step takes PROCESSES times --data.batch_size samples.
exec "${TORCHRUN:-torchrun}" --standalone --nproc-per-node="$PROCESSES" -m lightning_memsink fit \
  --config watch \
  --trainer.strategy=ddp \
  --trainer.devices="$PROCESSES" \
  "$@"
