-- What was accepted never changes, what is open is small, what has ended is appended. These are the tables that SQLite has after
-- its third migration.

-- What was accepted. The row is the intent: as long as its purchase is open, the reconciler publishes its saga's start
-- again.
CREATE TABLE IF NOT EXISTS purchase_accepted (
    id              BIGINT     NOT NULL PRIMARY KEY,
    customer_id     BIGINT     NOT NULL,
    idempotency_key VARBINARY(255),
    request_hash    BINARY(32),             -- SHA-256 of what was asked for under the key
    input           MEDIUMBLOB NOT NULL,    -- the saga's input: the purchase as accepted
    trace           TEXT       NOT NULL,    -- W3C traceparent
    created_at      BIGINT     NOT NULL,    -- Unix milliseconds, as all times here
    deadline_at     BIGINT     NOT NULL,
    UNIQUE KEY purchase_accepted_key (customer_id, idempotency_key)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- What has not ended: as many rows as may be in flight, and those left to an operator.
CREATE TABLE IF NOT EXISTS purchase_open (
    id           BIGINT NOT NULL PRIMARY KEY,
    customer_id  BIGINT NOT NULL,
    created_at   BIGINT NOT NULL,
    state        INT    NOT NULL CHECK (state IN (0, 4)),  -- 0 open, 4 needs an operator
    next_wake_at BIGINT,                                   -- set exactly while it is open
    tries        BIGINT NOT NULL,                          -- by the reconciler, since it was last started
    reason       TEXT,                                     -- of an operator's
    path         MEDIUMBLOB,                               -- likewise: how far it had come
    CHECK ((state = 0) = (next_wake_at IS NOT NULL))
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- What has ended, in the order in which it did.
CREATE TABLE IF NOT EXISTS purchase_ended (
    finished_no BIGINT     NOT NULL PRIMARY KEY,
    id          BIGINT     NOT NULL,
    customer_id BIGINT     NOT NULL,
    state       INT        NOT NULL CHECK (state BETWEEN 1 AND 3),  -- succeeded, failed, cancelled
    finished_at BIGINT     NOT NULL,
    reason      TEXT,
    path        MEDIUMBLOB NOT NULL,                                -- the saga's whole path
    UNIQUE KEY purchase_ended_id (id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- A customer's purchases that have ended, by id and by the order of their ends. Rows come in batches: one purchase at a time, each
-- would write a page of its own. What ended after purchase_finish.indexed is not here yet.
CREATE TABLE IF NOT EXISTS customer_purchase (
    customer_id BIGINT NOT NULL,
    id          BIGINT NOT NULL,
    PRIMARY KEY (customer_id, id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

CREATE TABLE IF NOT EXISTS customer_ended (
    customer_id BIGINT NOT NULL,
    finished_no BIGINT NOT NULL,
    PRIMARY KEY (customer_id, finished_no)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;

-- The last number in the order of ends, and the one up to which customers' purchases are listed by customer.
CREATE TABLE IF NOT EXISTS purchase_finish (
    only    INT    NOT NULL PRIMARY KEY CHECK (only = 1),
    no      BIGINT NOT NULL,
    indexed BIGINT NOT NULL
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;
INSERT IGNORE INTO purchase_finish (only, no, indexed) VALUES (1, 0, 0);

-- A purchase as it stands.
CREATE OR REPLACE SQL SECURITY INVOKER VIEW purchase AS
SELECT a.id, a.customer_id, a.idempotency_key, a.request_hash, COALESCE(e.state, o.state, -1) AS state, a.input, a.trace,
       a.created_at, a.deadline_at, o.next_wake_at, COALESCE(o.tries, 0) AS tries, e.finished_at, e.finished_no,
       COALESCE(e.reason, o.reason) AS reason, COALESCE(e.path, o.path) AS path
FROM purchase_accepted AS a
LEFT JOIN purchase_open AS o ON o.id = a.id
LEFT JOIN purchase_ended AS e ON e.id = a.id;
