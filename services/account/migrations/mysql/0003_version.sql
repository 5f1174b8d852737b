-- Rises with each change: copies outside of the database are told apart by it.
-- Only MariaDB knows ADD COLUMN IF NOT EXISTS.
SET @add = IF(
    (SELECT COUNT(*) FROM information_schema.columns
     WHERE table_schema = DATABASE() AND table_name = 'customer' AND column_name = 'version') = 0,
    'ALTER TABLE customer ADD COLUMN version BIGINT NOT NULL DEFAULT 0',
    'DO 0'
);
PREPARE add_version FROM @add;
EXECUTE add_version;
DEALLOCATE PREPARE add_version;
