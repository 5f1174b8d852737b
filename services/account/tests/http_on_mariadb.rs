//! `http.rs` on MariaDB.

#[path = "http.rs"]
mod http;
