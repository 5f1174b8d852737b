#!/bin/sh
# Joins six nodes to a cluster of three primaries with a replica each, unless they are one already. Then they find each other by the
# addresses in their nodes.conf, which compose.yaml keeps the same. It gives up after some minutes: the shop runs without.
set -eu
export REDISCLI_AUTH="$(sed -n 's/^requirepass //p' /run/secrets/redis.conf)"

tries=60
wait_until() {
    until "$@"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || { echo "in vain: $* (a cluster that was begun and not finished stays so: remove the volumes of Redis)" >&2; exit 1; }
        sleep 1
    done
}
answers() { redis-cli -h "$1" ping | grep -q PONG; }
tells() { redis-cli -h redis-1 cluster info | tr -d '\r' | grep -qx "$1"; }

nodes=""
for node in 1 2 3 4 5 6; do
    wait_until answers "redis-$node"
    # Redis wants addresses here, not names.
    nodes="$nodes $(getent hosts "redis-$node" | cut -d' ' -f1):6379"
done
if tells cluster_known_nodes:1; then
    # It waits for them to meet, for as long as that takes.
    timeout 60 redis-cli --cluster create $nodes --cluster-replicas 1 --cluster-yes
fi
wait_until tells cluster_state:ok
echo "the cluster is there"
