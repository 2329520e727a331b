#!/usr/bin/env bash
# Watches a run on several processes of one machine, by torchrun: ledger and verdicts are the same on every rank.
#
#   recipes/distributed/torchrun.sh                                  # the demo on two processes, on CPUs or GPUs
#   PROCESSES=8 recipes/distributed/torchrun.sh --config mitigate/hold      # all that follows goes to `memsink fit`
#   recipes/distributed/torchrun.sh --ckpt_path=last.ckpt            # goes on, with as many processes as you like
set -euo pipefail

PROCESSES=${PROCESSES:-2}

# Each process gets an equal part of the samples, so a step sees PROCESSES times --data.batch_size of them.
exec "${TORCHRUN:-torchrun}" --standalone --nproc-per-node="$PROCESSES" -m lightning_memsink fit \
  --config watch \
  --trainer.strategy=ddp \
  --trainer.devices="$PROCESSES" \
  "$@"
