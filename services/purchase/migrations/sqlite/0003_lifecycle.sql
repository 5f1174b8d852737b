-- What was accepted never changes, what is open is small, what has ended is appended: three tables instead of one whose
-- rows grow and whose indexes are written three times for each purchase.

-- What was accepted. The row is the intent: as long as its purchase is open, the reconciler publishes its saga's start
-- again.
CREATE TABLE purchase_accepted (
    id              INTEGER PRIMARY KEY,
    customer_id     INTEGER NOT NULL,
    idempotency_key TEXT,
    request_hash    BLOB,              -- SHA-256 of what was asked for under the key
    input           BLOB    NOT NULL,  -- the saga's input: the purchase as accepted
    trace           TEXT    NOT NULL,  -- W3C traceparent
    created_at      INTEGER NOT NULL,  -- Unix milliseconds, as all times here
    deadline_at     INTEGER NOT NULL
) STRICT;

CREATE UNIQUE INDEX purchase_accepted_key ON purchase_accepted (customer_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;

-- What has not ended: as many rows as may be in flight, and those left to an operator.
CREATE TABLE purchase_open (
    id           INTEGER PRIMARY KEY,
    customer_id  INTEGER NOT NULL,
    created_at   INTEGER NOT NULL,
    state        INTEGER NOT NULL CHECK (state IN (0, 4)),  -- 0 open, 4 needs an operator
    next_wake_at INTEGER,                                   -- set exactly while it is open
    tries        INTEGER NOT NULL,                          -- by the reconciler, since it was last started
    reason       TEXT,                                      -- of an operator's
    path         BLOB,                                      -- likewise: how far it had come
    CHECK ((state = 0) = (next_wake_at IS NOT NULL))
) STRICT;

-- What has ended, in the order in which it did.
CREATE TABLE purchase_ended (
    finished_no INTEGER PRIMARY KEY,
    id          INTEGER NOT NULL UNIQUE,
    customer_id INTEGER NOT NULL,
    state       INTEGER NOT NULL CHECK (state BETWEEN 1 AND 3),  -- succeeded, failed, cancelled
    finished_at INTEGER NOT NULL,
    reason      TEXT,
    path        BLOB    NOT NULL                              -- the saga's whole path
) STRICT;

-- A customer's purchases that have ended, by id and by the order of their ends. Rows come in batches: one purchase at a time, each
-- would write a page of its own. What ended after purchase_finish.indexed is not here yet.
CREATE TABLE customer_purchase (
    customer_id INTEGER NOT NULL,
    id          INTEGER NOT NULL,
    PRIMARY KEY (customer_id, id)
) WITHOUT ROWID, STRICT;

CREATE TABLE customer_ended (
    customer_id INTEGER NOT NULL,
    finished_no INTEGER NOT NULL,
    PRIMARY KEY (customer_id, finished_no)
) WITHOUT ROWID, STRICT;

INSERT INTO purchase_accepted
SELECT id, customer_id, idempotency_key, request_hash, input, trace, created_at, deadline_at FROM purchase ORDER BY id;

INSERT INTO purchase_open
SELECT id, customer_id, created_at, state, next_wake_at, tries, reason, path FROM purchase
WHERE finished_no IS NULL ORDER BY id;

INSERT INTO purchase_ended
SELECT finished_no, id, customer_id, state, finished_at, reason, path FROM purchase
WHERE finished_no IS NOT NULL ORDER BY finished_no;

DROP TABLE purchase;

-- The last number in the order of ends, and the one up to which customers' purchases are listed by customer.
ALTER TABLE purchase_finish ADD COLUMN indexed INTEGER NOT NULL DEFAULT 0;
INSERT INTO customer_purchase SELECT customer_id, id FROM purchase_ended ORDER BY customer_id, id;
INSERT INTO customer_ended SELECT customer_id, finished_no FROM purchase_ended ORDER BY customer_id, finished_no;
UPDATE purchase_finish SET indexed = no;

-- A purchase as it stands.
CREATE VIEW purchase AS
SELECT a.id, a.customer_id, a.idempotency_key, a.request_hash, COALESCE(e.state, o.state, -1) AS state, a.input, a.trace,
       a.created_at, a.deadline_at, o.next_wake_at, COALESCE(o.tries, 0) AS tries, e.finished_at, e.finished_no,
       COALESCE(e.reason, o.reason) AS reason, COALESCE(e.path, o.path) AS path
FROM purchase_accepted AS a
LEFT JOIN purchase_open AS o ON o.id = a.id
LEFT JOIN purchase_ended AS e ON e.id = a.id;
