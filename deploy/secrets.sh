#!/bin/sh
# Makes the passwords that compose.yaml mounts, each at random, in deploy/secrets (which git ignores). It keeps what is there.
set -eu
umask 077
cd "$(dirname "$0")"
mkdir -p secrets
cd secrets

random() { head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'; }
# The containers' users are not the owner of these files: the folder is what keeps others out.
write() { cat > "$1.new" && chmod 444 "$1.new" && mv "$1.new" "$1"; }
password() { [ -s "$1" ] || random | write "$1"; cat "$1"; }

for service in account product order payment purchase; do
    password "mysql_$service" > /dev/null
done
password mysql_root > /dev/null
password grafana_admin > /dev/null
nats=$(password nats)
routes=$(password nats_routes)
redis=$(password redis)
admin=$(password catalog_admin)

write nats.conf <<END
authorization { user: saga, password: "$nats" }
END
write nats_routes.conf <<END
authorization { user: route, password: "$routes" }
routes: [
  nats-route://route:$routes@nats-1:6222
  nats-route://route:$routes@nats-2:6222
  nats-route://route:$routes@nats-3:6222
]
END
write redis.conf <<END
requirepass $redis
masterauth $redis
END

# What a service must know and nobody else: its own database's address, and those of the broker and the cache.
servers() {
    echo '[nats]'
    echo "url = \"nats://saga:$nats@nats-1:4222,nats://saga:$nats@nats-2:4222,nats://saga:$nats@nats-3:4222\""
    echo '[redis]'
    printf 'url = "'
    for node in 1 2 3 4 5 6; do
        [ $node = 1 ] || printf ,
        printf 'redis://:%s@redis-%s:6379' "$redis" $node
    done
    echo '"'
}
database() {
    echo '[mysql]'
    echo "$1 = \"mysql://saga_$1:$(cat "mysql_$1")@$2:3306/saga_$1\""
}
for service in account order payment; do
    { database $service "mysql-$service"; servers; } | write "$service.toml"
done
# Who creates products shows this token.
{ database product mysql-product; servers; printf '[catalog]\nadmin_token = "%s"\n' "$admin"; } | write product.toml
# The purchases live on the orders' server, in a database of their own, as there are four servers.
{ database purchase mysql-order; servers; } | write purchase.toml
servers | write orchestrator.toml
echo "deploy/secrets is ready"
