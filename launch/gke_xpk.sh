#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster, by xpk (pip install xpk):
#   bash launch/gke_xpk.sh --cluster my-cluster --workload gpt-1 --type v5litepod-16 \
#     --image us-docker.pkg.dev/my-project/images/t5x_lite:1 [--slices 2] [--restarts 10] \
#     -- --gin_file runs/pretrain_gpt.gin --model_dir /mnt/shared/runs/gpt
# The image has t5x_lite[tpu] installed (docs/pods.md has a Dockerfile). --restarts: how often the
# run may resume by itself. --slices N: several slices as one run; say how the mesh crosses them, such as
# --gin.MeshConfig.dcn_replica=N. --project P, --zone Z: other than gcloud's own.
# --dry_run: print the command. Not run on GKE so far.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/options.sh

cluster='' workload='' type='' image='' slices=1 restarts='' project='' zone=''
parse "cluster workload type image slices restarts project zone" -- "$@"
need cluster workload type image
need_count slices
need_train_options
options=(--cluster "$cluster" --workload "$workload" --tpu-type "$type" --num-slices "$slices")
options+=(--docker-image "$image")
if [ -n "$restarts" ]; then
  need_count restarts
  options+=(--max-restarts "$restarts")
fi
[ -z "$project" ] || options+=(--project "$project")
[ -z "$zone" ] || options+=(--zone "$zone")
run xpk workload create "${options[@]}" --command "t5x_lite train $(quoted "${rest[@]}")"
