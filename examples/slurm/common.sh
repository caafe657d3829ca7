# What the scripts of this folder have in common.  Each sets its parameters, sources this file, and goes on in sentences.
# Needs RUN_DIR, GPUS_PER_NODE, PYTHON, CONTAINER_MOUNTS and RUN_DOCTOR.
# shellcheck shell=bash

RUN_DIR=$(realpath -m "$RUN_DIR") # a container's mounts must begin with /
mkdir -p "$RUN_DIR" || exit
rm -f "$RUN_DIR/stopped"
export RUN_DIR GPUS_PER_NODE PYTHON PORT=$((20000 + SLURM_JOB_ID % 10000))
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since 22.05 srun does not take it over from sbatch

# srun's arguments for a container (pyxis), one a line; none without an image.
container_arguments() { # IMAGE
    local mounts=$PWD:$PWD,$RUN_DIR:$RUN_DIR${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    [ -z "$1" ] || printf '%s\n' "--container-image=$1" "--container-mounts=$mounts" "--container-workdir=$PWD"
}

# Every node's environment, in full from the first; ends the job where a run cannot start.
report_environment() { # SRUN_ARGUMENT...
    [ "$RUN_DOCTOR" = 1 ] || return 0
    # shellcheck disable=SC2016  # the tasks expand it
    srun --label "$@" bash -c '
        trap "" USR1 # the run will know by itself when its time is over
        [ "$SLURM_PROCID" = 0 ] || brief=--brief
        exec "$PYTHON" tools/doctor.py --ranks="$GPUS_PER_NODE" ${brief:-}'
    local status=$?
    [ "$status" = $((128 + 15)) ] && requeue "TERM, before the run had begun"
    [ "$status" = 0 ] || exit "$status"
}

# The run, on the nodes of this step.
train() { # SRUN_ARGUMENT... -- KEY=VALUE...
    local step=()
    while [ "$1" != -- ]; do step+=("$1") && shift; done
    srun --kill-on-bad-exit=1 "${step[@]}" bash examples/slurm/trainer_node.sh run_dir="$RUN_DIR" "${@:2}"
}

# The run leaves the file `stopped` when it has saved because it was asked to stop.  torchrun's status does not tell.
requeue_or_exit() { # STATUS
    [ -e "$RUN_DIR/stopped" ] && requeue "$(cat "$RUN_DIR/stopped")"
    exit "$1"
}

# Back into the queue.  A job that ends by itself while it is being preempted would not come there.
requeue() { # REASON
    echo "job $SLURM_JOB_ID goes back into the queue: $1"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # until Slurm ends this script
    echo "job $SLURM_JOB_ID cannot be requeued: submit it again to go on"
    exit 1
}
