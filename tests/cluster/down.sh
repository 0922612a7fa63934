#!/bin/bash
# Ends what up.sh DIR started, with its volumes.
set -euo pipefail
DIR=$(cd "${1:?the directory of up.sh}" && pwd)
cd "$(dirname "$0")/../.."
export CONTAINERS_CONF=$PWD/tests/cluster/containers.conf DOCKER_HOST=unix://$DIR/podman.sock
"${COMPOSE:-.venv/bin/docker-compose}" -f docker/compose.yaml -f tests/cluster/compose.standins.yaml down -v --timeout 10
xargs kill <"$DIR/pids"
