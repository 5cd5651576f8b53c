#!/bin/bash
# A pod of TPU virtual machines, by gcloud, which must be installed and logged in:
#
#   export TPU=s2s ZONE=us-west4-a TYPE=v5litepod-16
#   bash launch/tpu/pod.sh create                                  # --spot and other options of gcloud go after
#   bash launch/tpu/pod.sh install                                 # copies this folder to every host
#   bash launch/tpu/pod.sh train --config experiments/g2p.py --workdir /mnt/shared/run
#   bash launch/tpu/pod.sh delete
#
# The work directory must be on a file system that every host has mounted. Ctrl-C asks all hosts to save;
# the same train command goes on from there, also on a pod made anew after a preemption.
set -eu
: "${TPU:?the name of the pod}" "${ZONE:?its zone, such as us-west4-a}"
vm=(gcloud compute tpus tpu-vm)
port=8476

on() { # on HOST COMMAND: in the folder of s2s; HOST may be all
  "${vm[@]}" ssh "$TPU" --zone "$ZONE" --worker "$1" --command "cd s2s && $2"
}

case "${1:?create, install, train or delete}" in
  create)
    shift
    "${vm[@]}" create "$TPU" --zone "$ZONE" --accelerator-type "${TYPE:?such as v5litepod-16}" \
      --version "${VERSION:-tpu-ubuntu2204-base}" "$@"
    ;;
  install)
    bundle=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$bundle"' EXIT
    tar -czf "$bundle" pyproject.toml constraints.txt README.md LICENSE s2s experiments
    "${vm[@]}" scp "$bundle" "$TPU:s2s.tar.gz" --zone "$ZONE" --worker all
    "${vm[@]}" ssh "$TPU" --zone "$ZONE" --worker all --command "mkdir -p s2s && tar -xzf s2s.tar.gz -C s2s"
    on all "${PYTHON:-python3.11} -m venv .venv && .venv/bin/pip install --quiet -c constraints.txt -e '.[tpu]'"
    ;;
  train)
    shift
    read -r -a hosts <<< "$("${vm[@]}" describe "$TPU" --zone "$ZONE" \
      --format 'value[delimiter=" "](networkEndpoints.ipAddress)' | tr ';,' '  ')"
    arguments=$(printf ' %q' "$@")
    # Not through ssh's own signals: the hosts are asked by name.
    trap 'on all "pkill -TERM -f [s]2s.main" || true' INT TERM
    children=()
    for number in "${!hosts[@]}"; do
      on "$number" ".venv/bin/python -m s2s.main$arguments --coordinator=${hosts[0]}:$port \
--processes=${#hosts[@]} --process=$number" &
      children+=($!)
    done
    code=0
    for child in "${children[@]}"; do
      # A trapped signal ends a wait before its child has ended.
      while :; do
        wait "$child" && one=0 || one=$?
        kill -0 "$child" 2> /dev/null || break
      done
      [ "$one" -eq 0 ] || code=$one
    done
    exit "$code"
    ;;
  delete)
    "${vm[@]}" delete "$TPU" --zone "$ZONE" --quiet
    ;;
  *)
    echo "s2s: $1 is none of create, install, train, delete" >&2
    exit 2
    ;;
esac
