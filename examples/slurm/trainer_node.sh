#!/bin/bash
# Runs torchrun on a node of the trainer with the overrides of the run, and passes signals to the ranks.
set -uo pipefail

main() { # a function, so that bash reads the whole file first: the file may change while it runs
    # A signal must not end the ranks before they install their handlers, because Slurm does not requeue a job that
    # fails during its preemption.  The ranks inherit the ignored signals of this shell.
    trap "" USR1 TERM
    # TERM must not end torchrun either, which would leave its ranks half a minute (--signals-to-handle, if supported).
    export PET_SIGNALS_TO_HANDLE=SIGINT
    # Ranks follow SLURM_NODEID, so that neighbours in the network have neighbouring ranks, which the rendezvous of
    # c10d would mix.
    "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_STEP_NUM_NODES" --node-rank="$SLURM_NODEID" \
        --nproc-per-node="$GPUS_PER_NODE" --master-addr="$SLURM_LAUNCH_NODE_IPADDR" --master-port="$PORT" \
        -m megatron_selfdistill.train "$@" &
    torchrun=$!

    # Slurm sends a signal to all processes of a step or, with cgroups, to this process alone.  Therefore this process
    # sends the signal to the ranks, repeatedly, because a rank that is still importing misses it.
    signal='' next=0
    trap 'signal=USR1 next=0' USR1
    trap 'signal=TERM next=0' TERM
    while kill -0 "$torchrun" 2>/dev/null; do
        if [ -n "$signal" ] && ((SECONDS >= next)); then
            next=$((SECONDS + 15))
            # shellcheck disable=SC2046
            kill -s "$signal" $(ranks) 2>/dev/null
        fi
        sleep 1
    done
    wait "$torchrun"
    exit
}

ranks() { # the children of torchrun
    grep -lsx "PPid:[[:space:]]*$torchrun" /proc/[0-9]*/status | cut -d/ -f3
}

main "$@"
