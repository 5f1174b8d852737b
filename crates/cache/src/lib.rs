//! Caches with versions and membership filters, in process and in Redis.
