#!/bin/bash
# A real S3 server on loopback: one Ceph monitor, one OSD (a sparse file) and RADOS Gateway, run as the calling user.
# usage: ceph_up.sh DIR S3_PORT MON_PORT [GIB]   DIR must not exist yet; takes about 8 s; end it with ceph_down.sh DIR
# env:   S3_ACCESS_KEY and S3_SECRET_KEY, the credentials it will accept; S3_HOST, where it listens, 127.0.0.1 if
#        not set. Needs the packages of .ci/apt-packages.txt.
set -euo pipefail
DIR=${1:?directory that does not exist yet}
S3_PORT=${2:?port of the S3 server}
MON_PORT=${3:?port of the monitor}
GIB=${4:-8}
: "${S3_ACCESS_KEY:?must be set}" "${S3_SECRET_KEY:?must be set}"
HERE=$(cd "$(dirname "$0")" && pwd)

mkdir "$DIR"
mkdir "$DIR"/{mon,osd,rgw,run,log}
LOG=$DIR/log/setup.log
give_up() {
  echo "ceph_up.sh failed in line $1; the end of its logs:" >&2
  tail -n 15 "$DIR"/log/* >&2
  "$HERE/ceph_down.sh" "$DIR"
}
trap 'give_up $LINENO' ERR

FSID=$(cat /proc/sys/kernel/random/uuid)
OSD_UUID=$(cat /proc/sys/kernel/random/uuid)
cat >"$DIR/ceph.conf" <<CONF
[global]
fsid = $FSID
mon_host = [v2:127.0.0.1:$MON_PORT/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
keyring = $DIR/keyring
run_dir = $DIR/run
admin_socket = $DIR/run/\$name.asok
log_file = $DIR/log/\$name.log
log_to_stderr = false
err_to_stderr = true
pid_file = $DIR/run/\$name.pid
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 1000
mon_data_avail_warn = 1
mon_data_avail_crit = 1
auth_allow_insecure_global_id_reclaim = false
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
[mon.a]
mon_data = $DIR/mon
mon_initial_members = a
mon_cluster_log_to_file = false
[osd.0]
osd_data = $DIR/osd
osd_objectstore = bluestore
bluestore_block_size = $((GIB * 1024 * 1024 * 1024))
bluestore_block_create = true
bluestore_cache_size = 268435456
bluestore_cache_autotune = false
bluestore_fsck_on_mount = false
osd_op_num_shards = 2
[client.rgw.a]
rgw_data = $DIR/rgw
rgw_frontends = beast endpoint=${S3_HOST:-127.0.0.1}:$S3_PORT tcp_nodelay=1
rgw_enable_usage_log = false
rgw_enable_lc_threads = false
rgw_run_sync_thread = false
rgw_thread_pool_size = 64
CONF
export CEPH_CONF=$DIR/ceph.conf

{
  ceph-authtool -C "$DIR/keyring" --gen-key -n mon. --cap mon 'allow *'
  for who in client.admin client.rgw.a osd.0; do
    ceph-authtool "$DIR/keyring" --gen-key -n "$who" --cap mon 'allow *' --cap osd 'allow *'
  done
  monmaptool --create --fsid "$FSID" --addv a "[v2:127.0.0.1:$MON_PORT]" "$DIR/monmap"
  ceph-mon --id a --mkfs --monmap "$DIR/monmap" --keyring "$DIR/keyring"
  ceph-mon --id a
  timeout 60 ceph --connect-timeout 50 osd new "$OSD_UUID"
  ceph-osd --id 0 --mkfs --osd-uuid "$OSD_UUID"
  ceph-osd --id 0
  timeout 120 radosgw-admin -n client.rgw.a user create --uid=test --display-name=test \
    --access-key="$S3_ACCESS_KEY" --secret-key="$S3_SECRET_KEY"
  timeout 60 radosgw -n client.rgw.a
} >"$LOG" 2>&1

# A connection alone proves nothing: the port may be another server's.
answers() {
  exec 3<>"/dev/tcp/${S3_HOST:-127.0.0.1}/$S3_PORT" && printf 'GET / HTTP/1.0\r\n\r\n' >&3 && timeout 5 grep -q ListAllMyBuckets <&3
}
for _ in $(seq 100); do
  if (answers) 2>/dev/null; then exit 0; fi
  sleep 0.1
done
echo "no S3 server answers on port $S3_PORT" >>"$LOG"
false
