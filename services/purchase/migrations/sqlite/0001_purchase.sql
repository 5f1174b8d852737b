-- A purchase: what was accepted, how it ended. The row is the intent and the outbox in one: as long as it is open,
-- the reconciler publishes its saga's start again.
CREATE TABLE purchase (
    id              INTEGER PRIMARY KEY,
    customer_id     INTEGER NOT NULL,
    idempotency_key TEXT,
    request_hash    BLOB,              -- SHA-256 of what was asked for under the key
    state           INTEGER NOT NULL,  -- 0 open, 1 succeeded, 2 failed, 3 cancelled, 4 needs an operator
    input           BLOB    NOT NULL,  -- the saga's input: the purchase as accepted
    trace           TEXT    NOT NULL,  -- W3C traceparent
    created_at      INTEGER NOT NULL,  -- Unix milliseconds, as all times here
    deadline_at     INTEGER NOT NULL,
    next_wake_at    INTEGER,           -- set exactly while the purchase is open
    tries           INTEGER NOT NULL,  -- by the reconciler, since it was last started
    finished_at     INTEGER,
    finished_no     INTEGER,           -- the order in which purchases ended
    reason          TEXT,
    path            BLOB,              -- the saga's whole path, once it has ended
    CHECK ((state = 0) = (next_wake_at IS NOT NULL)),
    CHECK ((state IN (1, 2, 3)) = (finished_no IS NOT NULL))
) STRICT;

CREATE UNIQUE INDEX purchase_key ON purchase (customer_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX purchase_of_customer ON purchase (customer_id, id);
CREATE INDEX purchase_finished ON purchase (customer_id, finished_no) WHERE finished_no IS NOT NULL;
CREATE INDEX purchase_due ON purchase (next_wake_at) WHERE next_wake_at IS NOT NULL;
CREATE INDEX purchase_unfinished ON purchase (id) WHERE finished_no IS NULL;

-- The number of the purchase that ended last.
CREATE TABLE purchase_finish (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    no   INTEGER NOT NULL
) STRICT;
INSERT INTO purchase_finish (only, no) VALUES (1, 0);
