# The functions that all scripts of this directory share.  A script sets its parameters, sources this file and calls
# the functions.  The file needs RUN_DIR, GPUS_PER_NODE, PYTHON, CONTAINER_MOUNTS, NETWORK_INTERFACE and RUN_DOCTOR.
# shellcheck shell=bash

RUN_DIR=$(realpath -m "$RUN_DIR") # a container's mounts must begin with /
mkdir -p "$RUN_DIR" || exit
rm -f "$RUN_DIR/stopped"
export RUN_DIR GPUS_PER_NODE PYTHON PORT=$((20000 + SLURM_JOB_ID % 10000))
export SLURM_EXPORT_ENV=ALL # srun passes these variables on even if sbatch was given --export
[ -z "$NETWORK_INTERFACE" ] || export GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since version 22.05 srun does not inherit this value from sbatch

# Prints the arguments of srun for a container (pyxis), one per line; prints nothing without an image.
container_arguments() { # IMAGE
    local mounts=$PWD:$PWD,$RUN_DIR:$RUN_DIR${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    [ -z "$1" ] || printf '%s\n' "--container-image=$1" "--container-mounts=$mounts" "--container-workdir=$PWD"
}

# Reports the environment of every node, in full for the first node, and ends the job if a run cannot start.
report_environment() { # SRUN_ARGUMENT...
    [ "$RUN_DOCTOR" = 1 ] || return 0
    # shellcheck disable=SC2016  # the tasks expand it
    srun --label "$@" bash -c '
        trap "" USR1 # the run checks its time limit itself
        [ "$SLURM_PROCID" = 0 ] || brief=--brief
        exec "$PYTHON" -m megatron_selfdistill doctor --ranks="$GPUS_PER_NODE" ${brief:-}'
    local status=$?
    [ "$status" = $((128 + 15)) ] && requeue "TERM, before the run began"
    [ "$status" = 0 ] || exit "$status"
}

# Runs the trainer on the nodes of this step.
train() { # SRUN_ARGUMENT... -- KEY=VALUE...
    local step=()
    while [ "$1" != -- ]; do step+=("$1") && shift; done
    srun --kill-on-bad-exit=1 "${step[@]}" bash examples/slurm/trainer_node.sh run_dir="$RUN_DIR" "${@:2}"
}

# A run that was asked to stop saves and leaves the file `stopped`; the status of torchrun does not show this.
requeue_or_exit() { # STATUS
    [ -e "$RUN_DIR/stopped" ] && requeue "$(cat "$RUN_DIR/stopped")"
    exit "$1"
}

# Puts the job back into the queue.  Slurm does not requeue a job that ends by itself during its preemption.
requeue() { # REASON
    echo "job $SLURM_JOB_ID goes back into the queue: $1"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # until Slurm ends this script
    echo "job $SLURM_JOB_ID cannot be requeued: submit it again to go on"
    exit 1
}
