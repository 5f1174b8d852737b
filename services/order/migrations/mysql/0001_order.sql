CREATE TABLE IF NOT EXISTS purchase_order (
    id          BIGINT     NOT NULL PRIMARY KEY,  -- the purchase's id
    customer_id BIGINT     NOT NULL,
    items       MEDIUMTEXT NOT NULL,              -- JSON: [[product id, amount, price each], ...]
    created_at  BIGINT     NOT NULL               -- Unix milliseconds
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;
