-- Customers, and the families of refresh tokens that they logged in with.

CREATE TABLE customer (
    id            INTEGER PRIMARY KEY,
    firstname     TEXT    NOT NULL,
    lastname      TEXT    NOT NULL,
    -- As the customer writes it, and in the form that is compared.
    email         TEXT    NOT NULL,
    email_key     TEXT    NOT NULL UNIQUE,
    address       TEXT    NOT NULL,
    phone_number  TEXT    NOT NULL,
    phone_key     TEXT    NOT NULL UNIQUE,
    -- Argon2id in PHC string format.
    password_hash TEXT    NOT NULL,
    created_at    INTEGER NOT NULL
) STRICT;

-- One login, and all refresh tokens that descend from it.
CREATE TABLE refresh_family (
    id          INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customer (id),
    -- When its newest token expires, in Unix seconds.
    expires_at  INTEGER NOT NULL,
    -- Set once, at logout or when a spent token came again.
    revoked_at  INTEGER
) STRICT;

CREATE INDEX refresh_family_by_expiry ON refresh_family (expires_at);

-- Only a token's hash is kept. At most one token of a family is unspent.
CREATE TABLE refresh_token (
    token_hash BLOB    PRIMARY KEY CHECK (length(token_hash) = 32),
    family_id  INTEGER NOT NULL REFERENCES refresh_family (id),
    expires_at INTEGER NOT NULL,
    spent_at   INTEGER
) STRICT, WITHOUT ROWID;

CREATE INDEX refresh_token_by_expiry ON refresh_token (expires_at);
CREATE UNIQUE INDEX refresh_token_unspent ON refresh_token (family_id) WHERE spent_at IS NULL;
