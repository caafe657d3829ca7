#!/bin/bash
# What a node of the trainer does, its arguments being the run's: torchrun, and signals on their way to the ranks.
set -uo pipefail

main() { # read as a whole: this file may change while it runs
    # Until the ranks have handlers of their own they must not die of a signal: a job that fails while it is being
    # preempted is not requeued.  They inherit what is ignored here.
    trap "" USR1 TERM
    # Nor must torchrun, which would give its ranks half a minute at TERM (--signals-to-handle, where it knows that).
    export PET_SIGNALS_TO_HANDLE=SIGINT
    # Ranks follow SLURM_NODEID, so neighbours in the network are neighbours in rank; c10d's rendezvous would mix them.
    "$PYTHON" -m torch.distributed.run --nnodes="$SLURM_STEP_NUM_NODES" --node-rank="$SLURM_NODEID" \
        --nproc-per-node="$GPUS_PER_NODE" --master-addr="$SLURM_LAUNCH_NODE_IPADDR" --master-port="$PORT" \
        -m megatron_selfdistill.train "$@" &
    torchrun=$!

    # Of a step's processes Slurm signals all or, where it keeps them in a cgroup, this one alone.  So it tells the
    # ranks, and tells them again: one that was still importing has not heard it.
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

ranks() { # torchrun's children
    grep -lsx "PPid:[[:space:]]*$torchrun" /proc/[0-9]*/status | cut -d/ -f3
}

main "$@"
