//! Nothing by itself: see `tests/import`.
