//! Nothing by itself: see `tests/import.rs`.
