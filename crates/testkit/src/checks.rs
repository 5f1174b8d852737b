//! The invariants of the whole shop, checked on its databases.
