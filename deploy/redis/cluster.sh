#!/bin/sh
# Joins six nodes to a cluster of three primaries with a replica each, unless they are one already.
set -eu
export REDISCLI_AUTH="$(sed -n 's/^requirepass //p' /run/secrets/redis.conf)"
nodes=""
for node in 1 2 3 4 5 6; do
    until redis-cli -h "redis-$node" ping | grep -q PONG; do sleep 1; done
    # Redis wants addresses here, not names.
    nodes="$nodes $(getent hosts "redis-$node" | cut -d' ' -f1):6379"
done
if redis-cli -h redis-1 cluster info | grep -q cluster_state:ok; then
    echo "the cluster is there"
else
    redis-cli --cluster create $nodes --cluster-replicas 1 --cluster-yes
fi
