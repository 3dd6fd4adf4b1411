#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU pod, or of several slices, by gcloud:
#   bash launch/tpu_vm.sh create --name my-pod --zone us-west4-a --type v5litepod-16 \
#     --runtime v2-alpha-tpuv5-lite              a queued resource; add --capacity spot or reserved
#   bash launch/tpu_vm.sh status --name my-pod --zone us-west4-a
#   bash launch/tpu_vm.sh setup  --name my-pod --zone us-west4-a    the last commit, on every host
#   bash launch/tpu_vm.sh train  --name my-pod --zone us-west4-a -- --gin_file runs/pretrain_gpt.gin \
#     --model_dir /mnt/shared/runs/gpt "--gin.DATA_DIR='/mnt/shared/data'"
#   bash launch/tpu_vm.sh stop   --name my-pod --zone us-west4-a    save and stop; train resumes
#   bash launch/tpu_vm.sh delete --name my-pod --zone us-west4-a
# --slices N in all of them: several slices, my-pod-0 and so on, as one run; say in the gin options
# how the mesh crosses them, such as --gin.MeshConfig.dcn_replica=N.
# --project P: other than gcloud's own. --dry_run: print the commands. Not run on a TPU so far.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/options.sh

name='' zone='' type='' runtime='' slices=1 capacity='' project=''
verb=${1:-}
case $verb in
  create | status | setup | train | stop | delete) shift ;;
  --help | -h | '') usage && exit 0 ;;
  *) fail "no verb $verb; there are create, status, setup, train, stop, delete" ;;
esac
parse "name zone type runtime slices capacity project" -- "$@"
need name zone
need_count slices

place=(--zone "$zone")
[ -z "$project" ] || place+=(--project "$project")
nodes=("$name")
if [ "$slices" -gt 1 ]; then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# on_all COMMAND: on every host of every slice at once; fails if it failed anywhere.
on_all() {
  local node pid pids=() failed=0
  for node in "${nodes[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker all --command "$1" &
    pids+=($!)
    [ -z "$dry_run" ] || wait "$!"
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return "$failed"
}

case $verb in
  create)
    need type runtime
    options=(--accelerator-type "$type" --runtime-version "$runtime")
    case $capacity in
      '') ;;
      spot | reserved) options+=("--$capacity") ;;
      *) fail "--capacity $capacity must be spot or reserved" ;;
    esac
    if [ "$slices" -gt 1 ]; then
      options+=(--node-count "$slices" --node-prefix "$name")
    else
      options+=(--node-id "$name")
    fi
    run gcloud compute tpus queued-resources create "$name" "${place[@]}" "${options[@]}"
    ;;
  status)
    run gcloud compute tpus queued-resources describe "$name" "${place[@]}"
    ;;
  setup)
    archive=${TMPDIR:-/tmp}/t5x_lite.tar.gz
    run git archive --format tar.gz --output "$archive" HEAD
    for node in "${nodes[@]}"; do
      run gcloud compute tpus tpu-vm scp "$archive" "$node:" "${place[@]}" --worker all
    done
    on_all "mkdir -p t5x_lite && tar -xzf t5x_lite.tar.gz -C t5x_lite && cd t5x_lite &&\
 bash -c '. launch/environment.sh && make_environment .venv tpu'"
    ;;
  train)
    need_train_options
    on_all "cd t5x_lite && .venv/bin/t5x_lite train $(quoted "${rest[@]}")"
    ;;
  stop)
    # All stop at the same step, whichever is asked. The brackets keep the shell from finding itself.
    run gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${place[@]}" --worker 0 \
      --command "pkill -TERM -f '[t]5x_lite train'"
    ;;
  delete)
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force
    ;;
esac
