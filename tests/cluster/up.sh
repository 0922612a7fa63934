#!/bin/bash
# Brings up docker/compose.yaml for real where there is no Docker engine and nothing can be pulled: Debian's podman and
# buildah, the real Compose, images built on a debootstrap base, and stand-ins for SeaweedFS and PostgreSQL. As root.
#   tests/cluster/up.sh DIR      DIR keeps the base, the socket and the logs; minutes the first time
#   tests/cluster/down.sh DIR    ends it, with its volumes
# Needs: apt-get install podman buildah debootstrap runc netavark aardvark-dns catatonit iptables; PIP_CONF names a
# pip.conf for the build and WHEELS a directory of wheels that it may name, where pip needs them; TORCH_INDEX as in
# docker/Dockerfile.
set -euo pipefail
DIR=$(mkdir -p "${1:?a directory}" && cd "$1" && pwd)
cd "$(dirname "$0")/../.."
export CONTAINERS_CONF=$PWD/tests/cluster/containers.conf DOCKER_HOST=unix://$DIR/podman.sock

build() { # IMAGE ARGUMENT...
  nice buildah bud --isolation chroot --network host --format docker --pull-never --layers -t "localhost/$1" \
    --build-arg BASE=localhost/python-base "${@:2}" . >>"$DIR/build.log" 2>&1
}
if ! podman image exists localhost/python-base; then
  nice debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip bookworm "$DIR/base" \
    >>"$DIR/build.log" 2>&1
  rm -f "$DIR"/base/usr/lib/python3*/EXTERNALLY-MANAGED
  ln -sf python3 "$DIR/base/usr/bin/python"
  container=$(buildah from scratch)
  buildah add -q "$container" "$DIR/base" / >/dev/null
  buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
  buildah commit -q "$container" localhost/python-base >/dev/null
  buildah rm "$container" >/dev/null
fi
build mixflow:0.1.0 -v /etc/ssl/certs:/etc/ssl/certs:ro -f docker/Dockerfile ${TORCH_INDEX:+--build-arg "TORCH_INDEX=$TORCH_INDEX"} \
  ${PIP_CONF:+-v "$PIP_CONF:/etc/pip.conf:ro"} ${WHEELS:+-v "$WHEELS:$WHEELS:ro"}
for name in s3 postgres; do
  build "mixflow-standin-$name" --ignorefile /dev/null -f tests/cluster/Dockerfile.standins --target "$name"
done

podman system service --time=0 "$DOCKER_HOST" >"$DIR/podman.log" 2>&1 &
echo $! >"$DIR/pids"
# podman has systemd's timers run its health checks; there is no systemd here.
while sleep 2; do
  for container in $(podman ps -q); do timeout 20 podman healthcheck run "$container" >/dev/null 2>&1 || true; done
done </dev/null >/dev/null 2>&1 &
echo $! >>"$DIR/pids"
[ -e docker/.env ] || .venv/bin/mixflow doctor --init-env
MIXFLOW_IMAGE=localhost/mixflow:0.1.0 "${COMPOSE:-.venv/bin/docker-compose}" -f docker/compose.yaml \
  -f tests/cluster/compose.standins.yaml up -d --pull never --no-build
podman ps --format '{{.Names}}  {{.Status}}'
