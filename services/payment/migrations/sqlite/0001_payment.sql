CREATE TABLE payment (
    id            INTEGER PRIMARY KEY,  -- the purchase's id
    customer_id   INTEGER NOT NULL,
    currency_code TEXT    NOT NULL,
    amount        INTEGER NOT NULL CHECK (amount >= 0),
    created_at    INTEGER NOT NULL      -- Unix milliseconds
) STRICT;
