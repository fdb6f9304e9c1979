//! Measures A and B alternately, and computes the median of each.

use std::time::Duration;

use anyhow::Result;
use futures::future::BoxFuture;

/// The side that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Ours,
    Theirs,
}

/// The times of both sides, in nanoseconds for one operation.
#[derive(Default)]
pub(crate) struct Rounds {
    blocks: [Vec<f64>; 2],
    ended: [Vec<f64>; 2],
    turns: usize,
}

impl Rounds {
    /// Measures both sides of each block alternately. Each round has `blocks` blocks, and one
    /// before them that does not count. A block has `operations` operations.
    pub(crate) async fn run<'a>(
        [rounds, blocks, operations]: [usize; 3],
        measure: impl Fn(Side, usize) -> BoxFuture<'a, Result<Duration>>,
    ) -> Result<Self> {
        let mut this = Self::default();
        for block in 0..=rounds * blocks {
            for side in this.turn() {
                let time = measure(side, block).await?;
                if block > 0 {
                    this.took(side, time, operations);
                }
            }
            if block > 0 && block.is_multiple_of(blocks) {
                this.ends();
            }
            // Let the store's background tasks run.
            tokio::task::yield_now().await;
        }
        Ok(this)
    }

    /// The order of the two sides in the next block. Each side comes first equally often.
    pub(crate) fn turn(&mut self) -> [Side; 2] {
        self.turns += 1;
        if self.turns.is_multiple_of(2) {
            [Side::Ours, Side::Theirs]
        } else {
            [Side::Theirs, Side::Ours]
        }
    }

    /// Records the time of a block of `operations` operations.
    #[allow(clippy::cast_precision_loss, reason = "a figure to read")]
    pub(crate) fn took(&mut self, side: Side, time: Duration, operations: usize) {
        self.blocks[side as usize].push(time.as_secs_f64() * 1e9 / operations as f64);
    }

    /// Ends a round: its figure is the median of its blocks.
    pub(crate) fn ends(&mut self) {
        for (blocks, rounds) in self.blocks.iter_mut().zip(&mut self.ended) {
            rounds.push(median(blocks));
            blocks.clear();
        }
    }

    /// The time of ours divided by the time of theirs.
    pub(crate) fn ratio(&self) -> f64 {
        self.of(Side::Ours) / self.of(Side::Theirs)
    }

    /// The throughput of ours divided by the throughput of theirs.
    pub(crate) fn throughput_ratio(&self) -> f64 {
        1.0 / self.ratio()
    }

    /// Prints the times on stderr.
    pub(crate) fn tell(&self, ours: &str, theirs: &str) {
        for (side, name) in [(Side::Ours, ours), (Side::Theirs, theirs)] {
            let rounds = &self.ended[side as usize];
            let least = rounds.iter().copied().fold(f64::INFINITY, f64::min);
            let most = rounds.iter().copied().fold(0.0, f64::max);
            let count = rounds.len();
            let median = self.of(side);
            eprintln!("  {name}: {median:.0} ns (rounds: {count}, {least:.0} to {most:.0})");
        }
    }

    fn of(&self, side: Side) -> f64 {
        median(&mut self.ended[side as usize].clone())
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[len / 2],
        len => f64::midpoint(values[len / 2 - 1], values[len / 2]),
    }
}
