#!/bin/sh
# Writes base/rules.yaml, the PrometheusRule, from deploy/prometheus/rules.yml; a test fails if they differ.
set -eu
cd "$(dirname "$0")"
{
  cat <<'END'
# Written by deploy/kubernetes/rules.sh from deploy/prometheus/rules.yml: change that one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: kuaishang
  labels: {app.kubernetes.io/name: kuaishang}
spec:
END
  sed -n '/^groups:/,$ p' ../prometheus/rules.yml | sed 's/^./  &/'
} >base/rules.yaml
