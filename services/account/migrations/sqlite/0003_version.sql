-- Rises with each change: copies outside of the database are told apart by it.
ALTER TABLE customer ADD COLUMN version INTEGER NOT NULL DEFAULT 0;
