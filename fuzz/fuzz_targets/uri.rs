#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tower_sessions_moka_mongodb_store::fuzzing::uri(bytes));
