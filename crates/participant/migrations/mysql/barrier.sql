-- What this participant has answered, per saga, step and phase (0 the action, 1 the compensation). The primary key
-- decides between two replicas that handle one command at the same time.
CREATE TABLE IF NOT EXISTS saga_barrier (
    saga        BIGINT     NOT NULL,
    step        INT        NOT NULL,
    phase       INT        NOT NULL CHECK (phase IN (0, 1)),
    reply       MEDIUMBLOB NOT NULL,
    recorded_at BIGINT     NOT NULL,
    PRIMARY KEY (saga, step, phase)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin;
