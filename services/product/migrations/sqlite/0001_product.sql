CREATE TABLE product (
    id          INTEGER PRIMARY KEY,
    name        TEXT    NOT NULL,
    description TEXT    NOT NULL,
    brand_name  TEXT    NOT NULL,
    price       INTEGER NOT NULL CHECK (price >= 0),
    -- What can still be sold. A reservation takes from it, the compensation gives back.
    inventory   INTEGER NOT NULL CHECK (inventory >= 0)
) STRICT;
