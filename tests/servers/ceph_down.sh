#!/bin/bash
# Ends the daemons that `ceph_up.sh DIR` started, found by the pid files in DIR; the directory stays.
# usage: ceph_down.sh DIR
set -u
DIR=${1:?directory given to ceph_up.sh}

# A pid file outlives its daemon, so the number counts only while its process runs on this directory's configuration.
ours() { { tr '\0' '\n' <"/proc/$1/environ" | grep -qxF "CEPH_CONF=$DIR/ceph.conf"; } 2>/dev/null; }

for name in client.rgw.a osd.0 mon.a; do
  file=$DIR/run/$name.pid
  [ -s "$file" ] || continue
  pid=$(cat "$file")
  ours "$pid" && kill "$pid"
  for _ in $(seq 50); do
    ours "$pid" || break
    sleep 0.1
  done
  ours "$pid" && kill -9 "$pid"
done
exit 0
