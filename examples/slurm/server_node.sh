#!/bin/bash
# What a rollout node does: its servers, or its part of one that spans nodes.  It ends when the last of them does.
set -uo pipefail

main() { # read as a whole: this file may change while it runs
    trap "" USR1 # is for the trainer, which still needs its servers then
    # So does a trainer that TERM finds in the middle of a step, if Slurm has not sent TERM to the servers themselves.
    trap 'touch "$RUN_DIR/servers/asked_to_stop"' TERM
    read -ra heads <<<"$SERVER_HEADS"
    for ((i = 0; i < SERVERS_PER_NODE; i++)); do
        gpus=$(seq -s, $((i * NODE_GPUS)) $((i * NODE_GPUS + NODE_GPUS - 1)))
        # shellcheck disable=SC2086
        CUDA_VISIBLE_DEVICES=$gpus "$SERVER_PYTHON" -m megatron_selfdistill.rollout.vllm.server.serve --hf-config="$HF_CONFIG" \
            --host="$SERVER_HOST" --port=$((SERVER_PORT + i)) --tensor-parallel-size="$SERVER_GPUS" \
            --nnodes="$SERVER_NODES" --node-rank=$((SLURM_NODEID % SERVER_NODES)) \
            --master-addr="${heads[SLURM_NODEID / SERVER_NODES]}" --master-port=$((SERVER_PORT + 8)) $SERVER_ARGS &
    done
    while [ -n "$(jobs -rp)" ]; do wait; done
    exit
}

main
