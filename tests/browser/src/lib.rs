//! Nothing but tests: see `tests/account`.
