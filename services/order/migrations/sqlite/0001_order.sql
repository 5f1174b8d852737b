CREATE TABLE purchase_order (
    id          INTEGER PRIMARY KEY,  -- the purchase's id
    customer_id INTEGER NOT NULL,
    items       TEXT    NOT NULL,     -- JSON: [[product id, amount, price each], ...]
    created_at  INTEGER NOT NULL      -- Unix milliseconds
) STRICT;
