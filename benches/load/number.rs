//! Numbers.

/// Converts a count. Counts are far smaller than the numbers that a float cannot represent.
#[allow(clippy::cast_precision_loss, reason = "counts stay below 2^53")]
pub(crate) fn float(count: u64) -> f64 {
    count as f64
}
