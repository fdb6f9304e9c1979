//! The chart of the operator's page: two stacked areas, as paths of an SVG.

use std::fmt::Write;

use crate::figures::{Loads, SECONDS};

/// The size of the chart in the SVG's own units. The page stretches it.
pub(crate) const WIDTH: usize = 4 * SECONDS;
pub(crate) const HEIGHT: u64 = 160;

/// The loads of each second.
pub(crate) struct Chart {
    /// The value at the top of the chart.
    pub(crate) top: u64,
    /// The area of the loads from memory.
    pub(crate) memory: String,
    /// The area of the loads from MongoDB, stacked on the other.
    pub(crate) mongo: String,
}

impl Chart {
    pub(crate) fn of(seconds: &[Loads]) -> Self {
        let top = round(seconds.iter().map(|second| second.all()).max().unwrap_or(0));
        let ground = seconds.iter().map(|_| 0).collect::<Vec<_>>();
        let memory = seconds.iter().map(|second| second.memory).collect::<Vec<_>>();
        let all = seconds.iter().map(|second| second.all()).collect::<Vec<_>>();
        Self { top, memory: area(&ground, &memory, top), mongo: area(&memory, &all, top) }
    }
}

/// The path around the area between two lines. The latest second is at the right edge.
fn area(below: &[u64], above: &[u64], top: u64) -> String {
    let left = SECONDS.saturating_sub(above.len());
    let points = |line: &[u64]| {
        let place = |(index, value): (usize, &u64)| {
            let x = (left + index) * WIDTH / (SECONDS - 1).max(1);
            (x, HEIGHT - value * HEIGHT / top)
        };
        line.iter().enumerate().map(place).collect::<Vec<_>>()
    };
    let there = points(above);
    let back = points(below);
    let mut path = String::new();
    for (index, (x, y)) in there.into_iter().chain(back.into_iter().rev()).enumerate() {
        let _ = write!(path, "{}{x} {y}", if index == 0 { 'M' } else { 'L' });
    }
    if !path.is_empty() {
        path.push('Z');
    }
    path
}

/// The next round number whose half is a whole number.
fn round(highest: u64) -> u64 {
    let mut unit = 1_u64;
    loop {
        for digit in [4, 6, 8, 12, 16, 20, 24, 30] {
            let top = unit.saturating_mul(digit);
            if top >= highest {
                return top;
            }
        }
        unit = unit.saturating_mul(10);
    }
}
