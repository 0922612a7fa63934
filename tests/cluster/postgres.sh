#!/bin/bash
# What the official image does, as far as docker/compose.yaml relies on it: user, database and password of the
# environment and the .sql files of /docker-entrypoint-initdb.d at the first start; then the server.
set -euo pipefail
data=/var/lib/postgresql/data
as_postgres() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
if [ ! -e "$data/PG_VERSION" ]; then
  chown postgres:postgres "$data"
  (umask 077 && echo "$POSTGRES_PASSWORD" >/tmp/password && chown postgres /tmp/password)
  as_postgres initdb -D "$data" -U "$POSTGRES_USER" -A scram-sha-256 --pwfile=/tmp/password -E UTF8
  rm /tmp/password
  echo "host all all all scram-sha-256" >>"$data/pg_hba.conf"
  as_postgres pg_ctl -D "$data" -w -o "-c listen_addresses= -c unix_socket_directories=/tmp" start
  export PGPASSWORD=$POSTGRES_PASSWORD
  as_postgres psql -h /tmp -U "$POSTGRES_USER" -d postgres -c "CREATE DATABASE \"$POSTGRES_DB\""
  for file in /docker-entrypoint-initdb.d/*.sql; do as_postgres psql -h /tmp -U "$POSTGRES_USER" -d "$POSTGRES_DB" -f "$file"; done
  as_postgres pg_ctl -D "$data" -w stop
fi
exec setpriv --reuid=postgres --regid=postgres --clear-groups \
  postgres -D "$data" -c listen_addresses='*' -c unix_socket_directories=/tmp
