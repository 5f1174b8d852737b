#!/bin/bash
# Runs once, when the orders' server is new: the purchases' database and user beside its own.
set -euo pipefail
password=$(< /run/secrets/mysql_purchase)
mysql --user=root --password="$(< /run/secrets/mysql_root)" <<END
CREATE DATABASE IF NOT EXISTS saga_purchase CHARACTER SET utf8mb4;
CREATE USER IF NOT EXISTS 'saga_purchase'@'%' IDENTIFIED BY '$password';
GRANT ALL ON saga_purchase.* TO 'saga_purchase'@'%';
END
