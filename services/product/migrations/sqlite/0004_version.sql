-- Rises with each change of what is left: copies outside of the database are told apart by it.
ALTER TABLE product ADD COLUMN version INTEGER NOT NULL DEFAULT 0;
