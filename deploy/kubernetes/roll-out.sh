#!/bin/sh
# Puts an overlay live: the migration, and everything else when that is complete, and only then.
#   roll-out.sh OVERLAY [options of kubectl, such as --context=beijing]
# It ends with 0 when all pods are new, and otherwise says why; then the old ones serve.
set -eu
overlay=$1
shift

of_service() {
  kubectl --namespace=kuaishang "$@"
}

# A Job cannot be changed, so the one of the last release goes.
of_service "$@" delete job migrate --ignore-not-found
kubectl "$@" apply --kustomize="$overlay" --selector=app.kubernetes.io/component=migration
tries=130 # of 5 s, longer than the Job may take
until of_service "$@" wait job/migrate --for=condition=complete --timeout=5s; do
  tries=$((tries - 1))
  if [ $tries = 0 ] || of_service "$@" wait job/migrate --for=condition=failed --timeout=0; then
    of_service "$@" logs job/migrate || true
    echo "The migration is not complete: nothing else was changed." >&2
    exit 1
  fi
done
kubectl "$@" apply --kustomize="$overlay"
of_service "$@" rollout status deployment/kuaishang --timeout=15m
