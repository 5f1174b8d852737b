-- What this participant has answered, per saga, step and phase (0 the action, 1 the compensation).
CREATE TABLE saga_barrier (
    saga        INTEGER NOT NULL,
    step        INTEGER NOT NULL,
    phase       INTEGER NOT NULL CHECK (phase IN (0, 1)),
    reply       BLOB    NOT NULL,
    recorded_at INTEGER NOT NULL,
    PRIMARY KEY (saga, step, phase)
) WITHOUT ROWID, STRICT;
