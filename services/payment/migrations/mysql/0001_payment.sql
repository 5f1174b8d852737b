CREATE TABLE IF NOT EXISTS payment (
    id            BIGINT NOT NULL PRIMARY KEY,  -- the purchase's id
    customer_id   BIGINT NOT NULL,
    currency_code TEXT   NOT NULL,
    amount        BIGINT NOT NULL CHECK (amount >= 0),
    created_at    BIGINT NOT NULL               -- Unix milliseconds
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;
