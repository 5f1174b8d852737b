-- Customers, and the families of refresh tokens that they logged in with. What is compared is VARBINARY or BINARY, so that it
-- is compared byte by byte.

CREATE TABLE IF NOT EXISTS customer (
    id            BIGINT         NOT NULL PRIMARY KEY,
    firstname     TEXT           NOT NULL,
    lastname      TEXT           NOT NULL,
    -- As the customer writes it, and in the form that is compared.
    email         TEXT           NOT NULL,
    email_key     VARBINARY(768) NOT NULL,
    address       TEXT           NOT NULL,
    phone_number  TEXT           NOT NULL,
    phone_key     VARBINARY(64)  NOT NULL,
    -- Argon2id in PHC string format.
    password_hash TEXT           NOT NULL,
    created_at    BIGINT         NOT NULL,
    UNIQUE KEY customer_email_key (email_key),
    UNIQUE KEY customer_phone_key (phone_key)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- One login, and all refresh tokens that descend from it.
CREATE TABLE IF NOT EXISTS refresh_family (
    id          BIGINT NOT NULL PRIMARY KEY,
    customer_id BIGINT NOT NULL,
    -- When its newest token expires, in Unix seconds.
    expires_at  BIGINT NOT NULL,
    -- Set once, at logout or when a spent token came again.
    revoked_at  BIGINT,
    KEY refresh_family_by_expiry (expires_at),
    CONSTRAINT refresh_family_customer FOREIGN KEY (customer_id) REFERENCES customer (id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- Only a token's hash is kept. At most one token of a family is unspent.
CREATE TABLE IF NOT EXISTS refresh_token (
    token_hash     BINARY(32) NOT NULL PRIMARY KEY,
    family_id      BIGINT     NOT NULL,
    expires_at     BIGINT     NOT NULL,
    spent_at       BIGINT,
    -- The family, as long as the token is unspent.
    unspent_family BIGINT AS (IF(spent_at IS NULL, family_id, NULL)) STORED,
    KEY refresh_token_by_expiry (expires_at),
    UNIQUE KEY refresh_token_unspent (unspent_family),
    CONSTRAINT refresh_token_family FOREIGN KEY (family_id) REFERENCES refresh_family (id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;
