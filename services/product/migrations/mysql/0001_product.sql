CREATE TABLE IF NOT EXISTS product (
    id          BIGINT NOT NULL PRIMARY KEY,
    name        TEXT   NOT NULL,
    description TEXT   NOT NULL,
    brand_name  TEXT   NOT NULL,
    price       BIGINT NOT NULL CHECK (price >= 0),
    -- What can still be sold. A reservation takes from it, the compensation gives back.
    inventory   BIGINT NOT NULL CHECK (inventory >= 0)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;
