#!/bin/bash
# Ceph RADOS Gateway on port 8333 with the credentials that docker/compose.yaml gives SeaweedFS; data in /data.
set -euo pipefail
export S3_HOST=0.0.0.0 S3_ACCESS_KEY=$AWS_ACCESS_KEY_ID S3_SECRET_KEY=$AWS_SECRET_ACCESS_KEY CEPH_CONF=/data/ceph/ceph.conf
if [ -e "$CEPH_CONF" ]; then
  ceph-mon --id a && ceph-osd --id 0 && radosgw -n client.rgw.a
else
  ceph_up.sh /data/ceph 8333 6789
fi
exec sleep infinity
